"""The Hugging Face model behind a Lens: whether it still holds the hooked model's weights, and saving
it.

1. What the checkpoint holds is noted before the hooked model is made, and so are the parameters that
   the hooked model makes for itself (a bias that the checkpoint lacks).
2. Both compute with the same weights as long as neither has a parameter that was put in the place of
   another, and none of those made up was written to.
3. Saved are the noted tensors, as they are then, in a folder that appears when it is whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.modules.module as everywhere
from torch import Tensor

from qv_lens.errors import ConfigError, ModelError
from qv_lens.models.generation import own_settings_aside
from qv_lens.models.identity import bit_sum
from qv_lens.progress import seen, transformers_bars


class Checkpoint:
    """A Hugging Face model, the tensors of its `state`, and the hooked model that shares them."""

    def __init__(self, hf: Any, state: Mapping[str, Tensor], hooked: Any, bridge: bool) -> None:
        self.hf = hf
        self.state = dict(state)
        self._hooked = hooked
        self._bridge = bridge
        self._made_up = self._own_parameters()

    def shares(self) -> bool:
        """Whether the Hugging Face model still holds what the hooked model computes with."""
        held = {weight.data_ptr() for weight in self.state.values()}
        # a bridge runs the Hugging Face model's own modules
        same = self._bridge or all(w.data_ptr() in held for w in self.hf.parameters())
        return same and self._own_parameters() == self._made_up

    def alike(self) -> bool:
        """Whether the Hugging Face model computes what the hooked model does: it shares the weights,
        and has no hooks or dropout of its own."""
        return self.shares() and not self.hf.training and not own_hooks(self.hf.modules())

    def whole(self) -> Any:
        """The Hugging Face model. Raises `ModelError` where it no longer holds the weights."""
        if not self.shares():
            raise ModelError(
                "A parameter of the hooked model, or of the Hugging Face model behind it, was "
                "replaced, so that the two hold different weights. Write in place "
                "(parameter.data.copy_(...)) or apply a patch; nothing was written."
            )
        return self.hf

    def save(self, folder: str | Path, tokenizer: Any) -> Path:
        """Write it as a checkpoint that transformers alone can load. Raises `ConfigError` for a
        folder in use."""
        target = Path(folder)
        if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
            raise ConfigError(
                f"{target} already holds files. Choose a new folder; nothing was written."
            )
        state = {name: weight.detach().contiguous() for name, weight in self.state.items()}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as whole:
                # transformers refuses to write some that it reads
                with own_settings_aside(self.hf) as own, transformers_bars(seen()):
                    self.hf.save_pretrained(whole, state_dict=state)
                own.to_json_file(Path(whole) / "generation_config.json")
                tokenizer.save_pretrained(whole)
                Path(whole).chmod(0o755)
                os.replace(whole, target)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"Cannot write a checkpoint to {target}: {reason}. Nothing was left there."
            ) from error
        return target

    def _own_parameters(self) -> dict[str, int]:
        """The parameters that the hooked model does not share with the Hugging Face model, with the
        sum of their bits."""
        held = {weight.untyped_storage().data_ptr() for weight in self.state.values()}
        sums = {
            name: bit_sum(parameter)
            for name, parameter in self._hooked.named_parameters()
            if parameter.untyped_storage().data_ptr() not in held
        }
        if not sums:
            return {}
        device = next(iter(sums.values())).device
        # one transfer from a GPU, not one for each
        bits = torch.stack([each.to(device) for each in sums.values()]).tolist()
        return dict(zip(sums, bits, strict=True))


#: where the hooks come from that libraries put on modules for themselves
LIBRARIES = (
    "transformer_lens.model_bridge.", "transformers.", "accelerate.",
    "torch.utils.module_tracker", "torch.distributed._tools.",
)  # fmt: skip


def forwards(modules: Iterable[torch.nn.Module]) -> list[Any]:
    """The functions that stand in the place of a module's `forward`."""
    return [vars(module)["forward"] for module in modules if "forward" in vars(module)]


def own_hooks(modules: Iterable[torch.nn.Module]) -> tuple[Any, ...]:
    """The hooks on modules, of either pass, that no library put there for itself: those of one
    module, those of all (`torch.nn.modules.module.register_module_forward_hook`), and functions put
    in the place of a module's `forward`."""
    modules = list(modules)
    hooks = [hook for kind in _of_all_modules() for hook in kind.values()] + forwards(modules)
    for module in modules:
        for kind in _hooks_of(module):
            hooks += [hook for key, hook in kind.items() if key not in _wired(module)]
    return tuple(hook for hook in hooks if not _of_library(hook))


def _of_all_modules() -> tuple[Mapping[int, Any], ...]:
    return (
        everywhere._global_forward_pre_hooks,
        everywhere._global_forward_hooks,
        everywhere._global_backward_pre_hooks,
        everywhere._global_backward_hooks,
    )


def _hooks_of(module: torch.nn.Module) -> tuple[Mapping[int, Any], ...]:
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def _of_library(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a partial one
    return str(getattr(function, "__module__", None)).startswith(LIBRARIES)


def _wired(module: torch.nn.Module) -> set[int]:
    """Which hooks of a hook point are part of the model: the bridge of TransformerLens 4.3 hands
    activations from one hook point to another by permanent hooks of its own (OPT)."""
    return {handle.hook.id for handle in getattr(module, "fwd_hooks", ()) if _wiring(handle)}


def _wiring(handle: Any) -> bool:
    home = getattr(getattr(handle, "user_hook", None), "__module__", None) or ""
    return handle.is_permanent and home.startswith(LIBRARIES)
