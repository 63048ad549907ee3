"""Changes in place, and who sees them: the order of a network's operations across its units."""

from torch import fx, nn

from layerwise.core.layers import Network
from layerwise.core.settings import keep_whole, words
from layerwise.core.tracer import FLAG, caller, changes_in_place, operation_name, owner
from layerwise.errors import CannotSplit

# methods and functions whose result may be a view of their first input
VIEWS = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze",
    "expand", "expand_as", "view_as", "narrow", "select", "chunk", "split", "unbind",
    "tensor_split", "movedim", "swapaxes", "t", "contiguous", "detach", "to", "float", "type_as",
    "getitem", "getattr", "dropout", "dropout2d", "without_gradient", "diagonal", "unfold",
    "as_strided", "real", "data", "T", "mT",
}  # fmt: skip
VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def refuse_turned_changes(network: Network, place: dict[fx.Node, int]) -> None:
    """Refuse a change in place that units would make before or after others read the tensor.

    What holds weights beside the main path computes late, in the unit that needs its result.

    Raises:
        CannotSplit: naming both operations.
    """
    number = {node: position for position, node in enumerate(network.graph.nodes)}
    storage = {node: storage_of(network.root, node) for node in network.graph.nodes}
    for change in network.graph.nodes:
        if change.op in ("placeholder", "output", "get_attr") or not change.all_input_nodes:
            continue
        if not changes_in_place(network.root, change):
            continue
        changed = storage[change.all_input_nodes[0]]
        for reader in network.graph.nodes:
            if (
                reader is change
                or reader.op == "output"
                or changed not in {storage[source] for source in reader.all_input_nodes}
            ):
                continue
            before = number[reader] < number[change]
            if place[reader] > place[change] if before else place[reader] < place[change]:
                path = caller(change)
                raise CannotSplit(
                    f"Cannot split the network: {change.name!r} in {words(owner(change))} changes "
                    f"a tensor in place that {reader.name!r} in {words(owner(reader))} reads "
                    f"{'before' if before else 'after'}; the units would turn that order round. "
                    f"Make a new tensor, such as F.relu(x), not F.relu_(x). Or: {keep_whole(path)}."
                )


def changes_input(piece: nn.Module) -> bool:
    """Whether a piece changes an activation that enters it in place; True if it cannot be known."""
    if not isinstance(piece, fx.GraphModule):
        return True
    return any(
        changes_in_place(piece, node)
        and storage_of(piece, node.all_input_nodes[0]).op == "placeholder"
        for node in piece.graph.nodes
        if node.op in ("call_module", "call_method", "call_function") and node.all_input_nodes
    )


def storage_of(root: nn.Module, node: fx.Node) -> fx.Node:
    """The node whose memory a node's result may share."""
    while node.all_input_nodes and may_share(root, node):
        node = node.all_input_nodes[0]
    return node


def may_share(root: nn.Module, node: fx.Node) -> bool:
    if node.op in ("placeholder", "output", "get_attr"):
        return False
    if changes_in_place(root, node):
        return True
    if node.op == "call_module":
        return node.target != FLAG and isinstance(
            root.get_submodule(str(node.target)), VIEW_MODULES
        )
    return operation_name(node) in VIEWS
