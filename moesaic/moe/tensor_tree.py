"""Our results as trees of tensors: DDP and FSDP look in what a module returns for the tensors that they hook."""

from dataclasses import fields
from typing import Any, TypeVar

from torch.utils import _pytree  # what torch.export.register_dataclass calls, without torch's compiler

Class = TypeVar("Class", bound=type)


def tensor_tree(kind: Class) -> Class:
    """Register a dataclass whose fields are tensors, tuples of them, other such classes or None. A decorator."""
    names = [field.name for field in fields(kind)]

    def flatten(value: Any) -> tuple[list[Any], None]:
        return [getattr(value, name) for name in names], None

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(_pytree.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(values: Any, context: None) -> Any:
        return kind(**dict(zip(names, values, strict=True)))

    _pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return kind
