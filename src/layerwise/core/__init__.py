"""A network, cut into units that learn: split, unit, learner."""
