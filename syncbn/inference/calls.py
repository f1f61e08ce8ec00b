"""Who calls which module with whose output, as far as torch.fx can trace a model."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    node: fx.Node
    path: str
    module: nn.Module


class Calls:
    """All calls of modules in a model, as far as `torch.fx` can trace it.

    Args:
        model: of one that cannot be traced as a whole, the largest submodules that can be are, each once.
        layers: types whose calls are wanted, whatever happens inside.

    ``trace_error`` is the first reason why something could not be traced, None if all could.
    """

    def __init__(self, model: nn.Module, layers: tuple[type[nn.Module], ...]) -> None:
        self._layers = layers
        self._by_node: dict[fx.Node, Call] = {}
        self._num_calls: Counter[nn.Module] = Counter()
        self._read_tensors: set[int] = set()
        self.trace_error: Exception | None = None
        self._places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._trace(model, "")

    def of(self, module: nn.Module) -> list[Call]:
        """Every call of ``module``."""
        return [call for call in self._by_node.values() if call.module is module]

    def behind(self, node: fx.Node) -> Call | None:
        """The call whose output is the first argument of ``node``, if that is the output of a module."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        return self._by_node.get(source) if isinstance(source, fx.Node) else None

    def why_not_alone(self, module: nn.Module) -> str | None:
        """Why ``module`` cannot be changed for the sake of a single call; None if it can."""
        if self._num_calls[module] > 1:
            return f"is called {self._num_calls[module]} times"
        if self.trace_error is not None and self._places[module] > 1:
            return f"stands in {self._places[module]} places"
        if any(id(tensor) in self._read_tensors for tensor in _tensors(module)):
            return "has tensors that other code reads"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return "has forward hooks"
        if is_parametrized(module):
            return "has parametrized tensors"
        return None

    def _trace(self, module: nn.Module, path: str) -> None:
        if _has_no_children(module):
            return
        try:
            graph = _Tracer(self._layers).trace(module)
        except Exception as error:  # Whatever a forward does with a proxy: it cannot be traced, its children may.
            self.trace_error = self.trace_error or error
            for name, child in module.named_children():
                self._trace(child, f"{path}{name}.")
            return
        self._read(graph, dict(module.named_modules()), path)

    def _read(self, graph: fx.Graph, modules: Mapping[str, nn.Module], path: str) -> None:
        for node in graph.nodes:
            if node.op == "call_module":
                module = modules[str(node.target)]
                self._by_node[node] = Call(node, f"{path}{node.target}", module)
                self._num_calls[module] += 1
            elif node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                self._read_tensors.add(id(getattr(modules[owner], name)))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Tracer(fx.Tracer):
    """Sees each of ``layers`` as one call, and every use of a parameter or buffer by other code."""

    proxy_buffer_attributes = True

    def __init__(self, layers: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is one call, not the calls inside it."""
        is_layer = isinstance(m, self._layers) and _has_no_children(m)
        return is_layer or super().is_leaf_module(m, module_qualified_name)


def _has_no_children(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
