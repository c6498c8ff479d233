"""A bundle as a registration uses it: its own parts, wired by its own configuration, taken by their ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.checkpoints import setting_in, voxel_size_in
from monai_rl_reg.convolutions import quick_convolutions
from monai_rl_reg.errors import InputError, bare_input_errors
from monai_rl_reg.files import file_stamp
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.judge import load_judge
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.refinement import FOLD_WEIGHT
from monai_rl_reg.similarity import Similarity
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.tasks.task import State, Task

_package = Path(__file__).resolve().parent
BUNDLES = next((p for p in (_package / "bundles", _package.parent / "bundles") if p.is_dir()), Path("bundles"))
"""The folder of the bundles: inside the package where it was installed, beside it in the repository."""
DEFAULT_BUNDLE = BUNDLES / "rl_reg"
CONFIG = Path("configs") / "inference.json"
PARTS = ("device", "ckpt", "network", "task", "inferer", "case_transform", "preprocessing", "run")
"""Ids that a registration takes from it."""
WITH_LABELS = "with_labels.json"
"""Laid over ``train.json`` to train a policy that sees structures."""


def policy_files(folder: str | Path | None, ckpt: str | Path | None) -> dict[str, Any]:
    """Return :func:`file_stamp` of the ``config`` and the ``ckpt`` of a bundle, without loading it.

    Arguments as those of :class:`PolicyBundle`.

    Raises:
        InputError: if the bundle's configuration cannot be read.
    """
    folder = Path(folder) if folder is not None else DEFAULT_BUNDLE
    if ckpt is None:
        parser = _read(folder, folder / CONFIG)
        parser.update({"bundle_root": str(folder)})
        ckpt = str(parser.get_parsed_content("ckpt"))
    return {"config": file_stamp(folder / CONFIG), "ckpt": file_stamp(ckpt)}


def _read(folder: Path, *configs: Path) -> ConfigParser:
    if not (folder / CONFIG).is_file():
        hint = "" if folder != DEFAULT_BUNDLE else "; name one with --bundle"
        raise InputError(f"bundle {folder}: expected a folder with {CONFIG} in it, found none{hint}")
    parser = ConfigParser()
    try:
        parser.read_config(list(configs))
    except ValueError as error:
        raise InputError(f"bundle {folder}: expected configurations in JSON, found {error}") from error
    return parser


def _check_device(name: str) -> None:
    try:
        torch.ones(2, device=name).sum().item()
    except (RuntimeError, AssertionError) as error:
        what = str(error).splitlines()[0]
        raise InputError(f"device {name}: expected one that can be computed on, found: {what}") from error


class PolicyBundle:
    """The parts of a registration bundle's ``inference.json``, with the weights loaded.

    Whatever the configuration's ``run`` does before it runs the evaluator is done here: loading the weights.

    Attributes:
        anatomy: sees structures in the images for the policy, where it was trained with labels.
        critic: expects what the steps to come will gain, where the policy was trained with reinforcement.
        judge: tells what Dice to expect, where the checkpoint has one.
        pixdim: voxel size in mm that the configuration resamples to, if it does.
        voxel_size: the one that the policy was trained at, where the checkpoint says so.
        kept_smoothness: the weight on smoothness of its training, likewise.
        witness: sees structures in the images, by which the judge judges: its own, else the policy's, if it has any.

    Args:
        folder: the bundle; by default the package's ``rl_reg``.
        ckpt: weights; by default those that the configuration names.
        device: where to compute, for example ``cuda:0``; by default the configuration's choice.
        spatial_dims: 2 or 3.

    Raises:
        InputError: if the bundle or the weights are missing, or the weights are for another network.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        ckpt: str | Path | None = None,
        device: str | torch.device | None = None,
        spatial_dims: int = 3,
    ) -> None:
        self.folder = Path(folder) if folder is not None else DEFAULT_BUNDLE
        self.settings: dict[str, Any] = {"bundle_root": str(self.folder), "spatial_dims": spatial_dims}
        if ckpt is not None:
            self.settings["ckpt"] = str(ckpt)
        if device is not None:
            _check_device(str(device))
            self.settings["device"] = f"$torch.device({str(device)!r})"
        parser = self._parser()
        if missing := [name for name in PARTS if name not in parser]:
            raise InputError(f"bundle {self.folder}: expected one that registers, found no {missing[0]} in {CONFIG}")
        with bare_input_errors():
            self.device: torch.device = parser.get_parsed_content("device")
            self.ckpt = str(parser.get_parsed_content("ckpt"))
            self.network: nn.Module = parser.get_parsed_content("network").eval()
            self.task: Task = parser.get_parsed_content("task").to(self.device).eval()
            self.critic: TwinCritic | None = parser.get_parsed_content("critic") if "critic" in parser else None
            self.inferer: StepwiseInferer = parser.get_parsed_content("inferer")
            self.case_transform: Callable[[Any], Any] = parser.get_parsed_content("case_transform")
            self.preprocessing: Callable[[Any], Any] = parser.get_parsed_content("preprocessing")
            for i, line in enumerate(parser["run"]):
                if "@evaluator" not in str(line):
                    parser.get_parsed_content(f"run::{i}")
            judge = load_judge(self.ckpt, spatial_dims)
        self.judge = None if judge is None else judge.to(self.device)
        self.anatomy: Anatomy | None = getattr(self.task, "anatomy", None)
        kept = None if self.judge is None else self.judge.witness
        self.witness: Anatomy | None = self.anatomy if kept is None else kept
        self.pixdim = parser.get("pixdim")
        self.voxel_size = voxel_size_in(self.ckpt) if Path(self.ckpt).is_file() else None
        self.kept_smoothness: float | None = setting_in(self.ckpt, "smoothness_weight")

    @property
    def steps(self) -> int:
        """The number of steps that the configuration takes."""
        return self.inferer.steps

    @property
    def similarity(self) -> Similarity:
        """The similarity of the images that the configuration names."""
        return cast(RegistrationTask, self.task).similarity

    @property
    def sees(self) -> bool:
        """Whether the policy sees structures by itself: it was trained with labels."""
        return self.anatomy is not None

    def case_transform_to(self, pixdim: Sequence[float] | None) -> Callable[[Any], Any]:
        """Return the case transform with a change of the voxel size to this one; None keeps each image's own."""
        parser = self._parser(pixdim=pixdim)
        transform: Callable[[Any], Any] = parser.get_parsed_content("case_transform")
        return transform

    @cached_property
    def refinement_task(self) -> RegistrationTask:
        """The task with the loss that the policy was trained by, as far as the bundle's configurations tell.

        A network learns to leave folds out, a free field has to be told. Of a policy that was trained with labels it
        is the loss without them: similarity and folds. What the policy sees is no substitute for the labels (a free
        field soon fits its mistakes), and its field is rougher than the regulariser wants: both terms lower the Dice
        of the true labels.
        """
        configs = [path for path in self._training() if path.is_file()] or [self.folder / CONFIG]
        # not relaxed: of a refined field the loss has the last word
        as_trained: dict[str, Any] = {"anatomy": None, "relax": 0}
        as_trained["field_stride"] = cast(RegistrationTask, self.task).field_stride
        if self.kept_smoothness is not None:
            as_trained["smoothness_weight"] = self.kept_smoothness
        task: Any = self._parser(*configs, **as_trained).get_parsed_content("task").to(self.device).eval()
        task.fold_weight = max(task.fold_weight, FOLD_WEIGHT)
        if self.sees:
            task.dice_weight = task.smoothness_weight = 0.0
        task.similarity = self.similarity
        checked: RegistrationTask = task
        return checked

    @torch.no_grad()
    def see(self, network: Anatomy, image: Tensor) -> Tensor:
        """Return the probabilities ``(1 + K, *spatial)`` of background and structures, as a network sees an image.

        Args:
            network: :attr:`anatomy` or :attr:`witness`.
            image: (1, *spatial).
        """
        with quick_convolutions(self.device, half=self.inferer.half):
            seen: Tensor = network(image[None].to(self.device, torch.float32))
        return seen[0].to(image)

    def _training(self) -> list[Path]:
        names = ["train.json", WITH_LABELS] if self.sees else ["train.json"]
        return [self.folder / "configs" / name for name in names]

    def trajectory(
        self,
        image: Tensor,
        steps: int,
        *,
        structures: Tensor | None = None,
        sample: bool = False,
        worth: float | None = None,
    ) -> Iterator[State]:
        """Yield the first state and that after every step.

        Args:
            image: (1, 2, *spatial), fixed and moving.
            steps: how many.
            structures: (1, 2, K, *spatial), what :attr:`anatomy` sees in each, if it has looked at them already.
            sample: draw the plans instead of taking their mode.
            worth: gain in the task's score that :attr:`critic` must expect of all steps to come for one more; None
                takes all of them.
        """
        inferer = copy.copy(self.inferer)
        inferer.steps, inferer.sample = steps, sample
        if worth is not None:
            inferer.critic = self.critic
            inferer.worth = worth * cast(RegistrationTask, self.task).reward_scale + self.value_at_goal(image)
        known = {} if structures is None else {"structures": structures.to(self.device)}
        yield from inferer.trajectory(image.to(self.device), self.network, **known)

    @torch.no_grad()
    def value_at_goal(self, image: Tensor) -> float:
        """Return the critic's value where nothing is left to gain: of the fixed image and itself.

        It would be 0, had the critics been taught for ever. But what they learn is that a state is worth its reward and
        nearly all that the next one is, and a constant, the same in every state, goes away by 1 - gamma a time only.

        Args:
            image: (1, 2, *spatial), fixed and moving.
        """
        assert self.critic is not None
        (state,) = self.trajectory(image[:, [0, 0]], 0)
        policy = cast(PlannerActor, self.network)
        with quick_convolutions(self.device, half=self.inferer.half):
            plan, _, features = policy.decide(self.task.observe(state))
            return float(self.critic(features, plan).amin(1))

    def version(self) -> str:
        """Return the bundle's name and version, as its metadata has them."""
        path = self.folder / "configs" / "metadata.json"
        metadata = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return f"{metadata.get('name', self.folder.name)} {metadata.get('version', '')}".strip()

    def _parser(self, *configs: Path, **overrides: Any) -> ConfigParser:
        parser = _read(self.folder, *(configs or [self.folder / CONFIG]))
        config: Any = parser.config
        known = {key: value for key, value in (self.settings | overrides).items() if key in config}
        parser.update(known)
        return parser
