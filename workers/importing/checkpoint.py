"""A Lightning checkpoint of anomalib 2.x, read as data: tensors, numbers and names.

What is an object in it is never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.errors import BadWeights
from engines.files import sha256
from engines.meta import Kind
from workers.models.backbone import load_inert

# The parts of `model.` that hold tensors. `anomaly_map_generator` has a blur kernel in all.
_PARTS: dict[Kind, set[str]] = {
    "patchcore": {"feature_extractor", "memory_bank"},
    "padim": {"feature_extractor", "gaussian", "idx"},
    "efficientad": {"teacher", "student", "ae", "mean_std", "quantiles"},
}
# A part that only one other model of anomalib has.
_OTHERS = {
    "student_model": "Stfpm",
    "pca_model": "Dfm",
    "fast_flow_blocks": "Fastflow",
    "decoders": "Cflow",
    "classifier": "Dfkde",
    "fre_model": "Fre",
    "segdec": "Supersimplenet",
    "descriptor": "Cfa",
    "generator": "Ganomaly",
    "reconstructive_subnetwork": "Draem",
    "discrete_latent_model": "Dsr",
    "feature_encoder": "AnomalyDINO",
    "pca": "MHPatchcore",
}


@dataclass(frozen=True)
class Checkpoint:
    """A Lightning checkpoint: tensors, hyper-parameters, and what anomalib says beside them."""

    path: Path
    state: dict[str, torch.Tensor]
    said: dict[str, Any]  # hyper_parameters: arguments of anomalib's model
    content: dict[str, Any]  # all the rest

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read it without making any object that is in it.

        Raises:
            BadWeights: it is missing, damaged, holds code, or is no Lightning checkpoint.
        """
        if not path.is_file():
            raise BadWeights(f"{path} does not exist: --checkpoint takes a .ckpt of anomalib.")
        try:
            content = load_inert(path)
        except BadWeights:
            raise
        except Exception as error:  # torch.load lets any unpickling error through
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise BadWeights(f"{path} is damaged, or is no checkpoint ({why}).") from error
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise BadWeights(
                f"{path} is no Lightning checkpoint (it has no state_dict): --checkpoint takes the"
                " .ckpt that anomalib's Engine writes, not an exported model."
            )
        state = content.pop("state_dict")
        said = content.get("hyper_parameters")
        return cls(
            path,
            {str(name): value for name, value in state.items() if torch.is_tensor(value)},
            said if isinstance(said, dict) else {},
            content,
        )

    def kind(self) -> Kind:
        """Which model it is, by the names of its tensors; BadWeights when it is none of ours."""
        parts = {name.split(".")[1] for name in self.state if name.startswith("model.")}
        parts.discard("anomaly_map_generator")
        for kind, own in _PARTS.items():
            if parts == own:
                return kind
        other = next((_OTHERS[part] for part in sorted(parts) if part in _OTHERS), None)
        what = f"a {other} model" if other else "no model that Kensa knows"
        found = f" (its parts are {', '.join(sorted(parts)[:6])})" if parts else ""
        raise BadWeights(
            f"{self.path} is {what}{found}: Patchcore, Padim and EfficientAd can be imported."
        )

    def number(self, name: str) -> float | None:
        """A scalar of the state, None where it is absent or was never set (not a number)."""
        value = self.state.get(name)
        if value is None or value.numel() != 1 or not torch.isfinite(value).all():
            return None
        return float(value)

    def has(self, component: str) -> bool:
        """Whether anomalib's pre_processor or post_processor was on."""
        flags = self.content.get("anomalib_components_enabled")
        on = flags.get(component) if isinstance(flags, dict) else self.said.get(component)
        return on is not False

    def origin(self) -> dict[str, Any]:
        """Where a model comes from, for report.json. anomalib 2.7 writes no version of its own."""
        lightning = self.content.get("pytorch-lightning_version")
        version = self.content.get("anomalib_version")
        return {
            "file": self.path.name,
            "sha256": sha256(self.path),
            "anomalib": version if isinstance(version, str) else "not said by the checkpoint",
            "lightning": lightning if isinstance(lightning, str) else None,
        }
