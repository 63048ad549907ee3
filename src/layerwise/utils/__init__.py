"""Small helpers that know nothing of networks, losses or runs."""
