"""Deformable registration as a task: carry the moving image onto the fixed one by composed small fields.

References:
    SPAC, arXiv 2112.07415; RL-I2IT, arXiv 2309.13672, section on registration; the relaxation: J.-P. Thirion, Image
    matching as a diffusion process: an analogy with Maxwell's demons, Medical Image Analysis 1998.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss, DiffusionLoss
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import compose, jacobian_determinant
from monai_rl_reg.memory import keep_freed_memory
from monai_rl_reg.metrics import labelled, mean_label_dice
from monai_rl_reg.separable import enlarge, smooth
from monai_rl_reg.similarity import LocalNCC, Similarity
from monai_rl_reg.tasks.task import Act, State, Task
from monai_rl_reg.warping import Warp

LEAST_SIZE = 4
"""Voxels of an image in every direction."""
FOLD_MARGIN = 0.1
"""Jacobian determinants under this one are what ``fold_weight`` pushes up."""
RELAXED_LENGTH = 0.5
"""In voxels of the field's grid: no voxel goes farther in one step of the relaxation."""
RELAXED_SIGMA = 0.7
"""Of the Gaussian that smooths such a step, likewise."""


class RegistrationTask(Task):
    """State: fixed image, moving image as given, moving image as moved so far, displacement so far.

    The moved image is always one resampling of the original moving image by the composed displacement. The
    displacement lives on a grid of 1 / ``field_stride`` of the images' resolution and is upsampled to move them, so
    that composing fields costs little; what it does to images, structures and labels is judged at their resolution. The
    reward of a step is the gain in::

        score = reward_scale * (similarity - fold_penalty * share of folded voxels)

    with similarity = mean Dice over the fixed image's labels where labels are given (and ``dice_reward``), else that of
    the images. An episode terminates when Dice exceeds ``success``.

    Args:
        spatial_dims: 2 or 3.
        field_stride: voxels of the images to one of the displacement's grid, in every direction; the policy's
            ``action_stride``.
        anatomy: sees the labelled structures in one image; what it sees in both is observed beside the images, and
            its own loss is part of the task's. None observes the images alone.
        guide: a similarity whose pull on the moved image is observed beside the images: it tells where to go, and the
            policy learns how far. It is computed on the displacement's grid and on one of half its resolution, 2 d
            channels in all. None observes the images alone.
        relax: how often the field is relaxed for each action, all after the last one, where that makes the images more
            alike. The policy finds the way; the relaxation settles each voxel where the similarity pulls it, in detail
            that the policy does not reach.
        similarity: of the images, in the task loss and the reward; by default :class:`LocalNCC`.
        similarity_weight: its weight in the task loss; 0 leaves it out.
        smoothness_weight: weight of the diffusion regulariser on the composed field, in voxels of its grid.
        fold_weight: weight of the hinge on Jacobian determinants under a small margin, mean over the voxels.
        dice_weight: weight of the soft Dice term of the task loss; 0 keeps labels out of it.
        label_weights: weights of the label values in the soft Dice term, in ascending order; None weighs all alike.
        dice_sharpness: in the soft Dice term a voxel counts as wholly inside a moved region from a cover of
            1 / ``dice_sharpness`` on: 2 where the regions will be compared by a threshold.
        dice_reward: False rewards the gain in the images' similarity even where labels are given.
        nested_labels: the region of a label value is what has this value or a higher one, as a tumour's core lies in
            the tumour, or the core of a stroke in its soft edge; False takes each value as a region of its own.
        reward_scale: factor on the reward.
        fold_penalty: what a wholly folded image would cost, in units of the similarity.
        success: Dice above which an episode has reached its goal.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        *,
        field_stride: int = 1,
        anatomy: Anatomy | None = None,
        guide: Similarity | None = None,
        relax: int = 0,
        similarity: Similarity | None = None,
        similarity_weight: float = 1.0,
        smoothness_weight: float = 2.0,
        fold_weight: float = 0.0,
        dice_weight: float = 0.0,
        label_weights: Sequence[float] | None = None,
        dice_sharpness: float = 1.0,
        dice_reward: bool = True,
        nested_labels: bool = False,
        reward_scale: float = 10.0,
        fold_penalty: float = 1.0,
        success: float = 0.98,
    ) -> None:
        super().__init__()
        keep_freed_memory()  # two fifths of a step's time at 128 voxels a side
        self.spatial_dims = spatial_dims
        self.field_stride = field_stride
        self.anatomy = anatomy
        self.guide = guide
        self.relax = relax
        self.similarity = LocalNCC(spatial_dims) if similarity is None else similarity
        self.similarity_weight = similarity_weight
        self.smoothness_weight = smoothness_weight
        self.fold_weight = fold_weight
        self.dice_weight = dice_weight
        self.dice_sharpness = dice_sharpness
        self.dice_reward = dice_reward
        self.nested_labels = nested_labels
        self.reward_scale = reward_scale
        self.fold_penalty = fold_penalty
        self.success = success
        self.warp = Warp("bilinear", "border")
        self.warp_label = Warp("nearest", "border")
        self.smoothness = DiffusionLoss()
        # squared: the edge of a moved region, soft by interpolation, then costs less
        self.dice = DiceLoss(weight=label_weights, squared_pred=field_stride > 1)
        self.replay_keys = ("fixed", "moving", "displacement", "moved")
        if anatomy is not None:
            self.replay_keys += ("fixed_anatomy", "moving_anatomy", "moved_anatomy")
        if dice_weight > 0 or anatomy is not None:
            self.replay_keys += ("fixed_label", "moving_label")

    def reset(self, image: Tensor, label: Tensor | None = None, *, structures: Tensor | None = None) -> State:
        """Start from no displacement.

        Args:
            image: (B, 2, *spatial), fixed and moving, scaled to [0, 1].
            label: (B, 2, *spatial), integer labels of fixed and moving, or None;
                :data:`~monai_rl_reg.metrics.UNLABELLED` where an image of the batch has none.
            structures: (B, 2, K, *spatial), what ``anatomy`` sees in fixed and moving, where it has looked already.

        Raises:
            ValueError: if the image has not two channels or another number of dimensions.
        """
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != 2:
            expected = f"(B, 2, {', '.join('XYZ'[: self.spatial_dims])})"
            raise ValueError(f"expected image (fixed, moving) of shape {expected}, got {tuple(image.shape)}")
        if min(image.shape[2:]) < LEAST_SIZE:
            raise InputError(
                f"expected images of at least {LEAST_SIZE} voxels in every direction, found {tuple(image.shape[2:])}"
            )
        if label is not None and label.shape != image.shape:
            raise ValueError(f"expected labels of the images' shape {tuple(image.shape)}, got {tuple(label.shape)}")
        fixed, moving = image[:, :1].float(), image[:, 1:].float()
        grid = [-(-n // self.field_stride) for n in image.shape[2:]]
        state = {
            "fixed": fixed,
            "moving": moving,
            "moved": moving,
            "displacement": fixed.new_zeros(len(image), self.spatial_dims, *grid),
        }
        if self.anatomy is not None:
            for i, role in enumerate(("fixed", "moving")):
                seen = self.anatomy.see(state[role]) if structures is None else structures[:, i]
                state[f"{role}_anatomy"] = seen
            state["moved_anatomy"] = state["moving_anatomy"]
        if label is not None:
            label = label.round().to(torch.int32)
            state["fixed_label"], state["moving_label"] = label[:, :1], label[:, 1:]
        return state

    def observe(self, state: State) -> Tensor:
        """Return what the policy sees, (B, C, *spatial).

        C = 2 + 2 d + 2 K: the fixed image and the moved one so far, the pull of ``guide`` on two grids, and what is
        seen of the anatomy in fixed and moved image, K channels each; without guide or anatomy less theirs.
        """
        seen = [state["fixed"], state["moved"]]
        if self.guide is not None:
            images = torch.cat([state["moved"], state["fixed"]], dim=1)
            for stride in (self.field_stride, 2 * self.field_stride):
                moved, fixed = self._reduce(images, stride).split(1, dim=1)
                seen.append(self._repeat(self.guide.pull(moved, fixed), images, stride))
        if self.anatomy is not None:
            seen += [state["fixed_anatomy"], state["moved_anatomy"]]
        return torch.cat(seen, dim=1)

    def advance(self, state: State, action: Tensor) -> State:
        """Compose the step field ``action``, (B, d, *grid) in voxels of its grid; move the original image."""
        return self._displaced(state, compose(state["displacement"], action, self.warp))

    def settle(self, state: State, steps: int) -> State:
        """Smooth the field, and compose ``relax * steps`` steps of demons onto it, a = h G * p / (|p| + mean |p|).

        p is the similarity's pull, h at most :data:`RELAXED_LENGTH`, and G a Gaussian. So scaled, a weak edge pulls
        nearly as far as a strong one. Every step is smooth by itself, as in a fluid, so that the field may come to be
        as long as it has to. A step that does not bring a pair more similarity is taken back, and the next is half as
        long: images that agree stay as they are.
        """
        if self.relax == 0:
            return state
        with torch.autocast(state["moved"].device.type, enabled=False):  # 16 bits know a displacement of 5 to 0.03
            state = self._displaced(state, smooth(state["displacement"].float(), RELAXED_SIGMA))
            value, pull = self._pulled(state)
            each: tuple[int, ...] = len(value), *[1] * (pull.ndim - 1)
            longest = torch.full_like(value, RELAXED_LENGTH)
            for left in reversed(range(self.relax * steps)):
                length = pull.square().sum(1, keepdim=True).sqrt()  # torch's norm takes a millisecond for 8000 voxels
                typical = length.mean(dim=list(range(1, length.ndim)), keepdim=True)
                action = smooth(longest.reshape(each) * pull / (length + typical).clamp(min=1e-12), RELAXED_SIGMA)
                after = self.advance(state, action)
                if left:
                    value_after, pull_after = self._pulled(after)
                else:  # nobody follows the last one's pull
                    value_after, pull_after = self.similarity.estimate(after["moved"], after["fixed"]), pull
                better = value_after > value
                chosen = better.reshape(each)
                for key in {"displacement", "moved", "moved_anatomy"} & after.keys():
                    after[key] = torch.where(chosen, after[key], state[key])
                value, pull = torch.where(better, value_after, value), torch.where(chosen, pull_after, pull)
                longest = torch.where(better, longest, longest / 2)
                state = after
        return state

    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        """Advance; return also the gain in score, (B,), and whether Dice has reached ``success``, (B,).

        Raises:
            InputError: if ``dice_weight`` asks for labels and there are none.
        """
        self._require_labels(state)
        after = self.advance(state, action)
        before = state["score"] if "score" in state else self._score(state)[0]
        after["score"], dice = self._score(after)
        return after, self.reward_scale * (after["score"] - before), dice > self.success

    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        """Return smoothness and, by their weights, similarity, under its name, folds and soft Dice, after the step.

        Raises:
            InputError: if ``dice_weight`` asks for labels and there are none.
        """
        displacement = compose(state["displacement"], action, self.warp)
        terms = {"smoothness": self.smoothness_weight * self.smoothness(displacement)}
        field = self._full(displacement, state["moving"])
        if self.similarity_weight > 0:
            moved = self.warp(state["moving"], field)
            terms[self.similarity.name] = -self.similarity_weight * self.similarity(moved, state["fixed"]).mean()
        if self.fold_weight > 0:
            terms["folds"] = self.fold_weight * F.relu(FOLD_MARGIN - jacobian_determinant(displacement)).mean()
        if self.dice_weight > 0:
            self._require_labels(state)
            terms["dice"] = self.dice_weight * self._soft_dice(state, field)
        return terms

    def own_loss(self, state: State) -> dict[str, Tensor]:
        """Return the loss of ``anatomy`` on both images, unless it is to stay as it is.

        Raises:
            InputError: if there are no labels to learn it from.
        """
        if self.anatomy is None or not any(p.requires_grad for p in self.anatomy.parameters()):
            return {}
        self._require_labels(state)
        images, labels = (
            torch.cat([state[f"{role}{part}"] for role in ("fixed", "moving")]) for part in ("", "_label")
        )
        return {"anatomy": self.anatomy.loss(images, labels)}

    def output(self, state: State) -> Tensor:
        """Return the displacement field, (B, d, *spatial) in voxels of the images."""
        return self._full(state["displacement"], state["fixed"])

    def _displaced(self, state: State, displacement: Tensor) -> State:
        after = state | {"displacement": displacement}
        field = self.output(after)
        if self.anatomy is None:
            after["moved"] = self.warp(state["moving"], field)
        else:  # together, in 0.7 of the time
            moved = self.warp(torch.cat([state["moving"], state["moving_anatomy"]], dim=1), field)
            after["moved"], after["moved_anatomy"] = moved[:, :1], moved[:, 1:]
        after.pop("score", None)  # was that of another displacement
        return after

    def _pulled(self, state: State) -> tuple[Tensor, Tensor]:
        """The similarity, (B,), and its pull on the field's grid."""
        value, pull = self.similarity.value_and_pull(state["moved"], state["fixed"])
        return value, self._reduce(pull, self.field_stride)

    def _require_labels(self, state: State) -> None:
        if (self.dice_weight > 0 or self.anatomy is not None) and "fixed_label" not in state:
            asked = f"dice_weight {self.dice_weight:g}" if self.dice_weight > 0 else "anatomy"
            raise InputError(f"{asked}: expected labels in training, found pairs without")

    def _full(self, displacement: Tensor, image: Tensor) -> Tensor:
        if self.field_stride == 1:
            return displacement
        return self._crop(enlarge(self.field_stride * displacement, self.field_stride), image)

    def _repeat(self, x: Tensor, image: Tensor, stride: int) -> Tensor:
        return x if stride == 1 else self._crop(F.interpolate(x, scale_factor=stride, mode="nearest"), image)

    def _crop(self, x: Tensor, image: Tensor) -> Tensor:
        for dim, n in enumerate(image.shape[2:], start=2):
            x = x.narrow(dim, 0, n)
        return x

    def _reduce(self, x: Tensor, stride: int) -> Tensor:
        """The mean of every block of ``stride`` voxels: what lies there of an image or of regions."""
        if stride == 1:
            return x
        pads = [p for n in x.shape[:1:-1] for p in (0, -n % stride)]
        pool = F.avg_pool3d if self.spatial_dims == 3 else F.avg_pool2d
        return pool(F.pad(x, pads, mode="replicate") if any(pads) else x, stride)

    def _score(self, state: State) -> tuple[Tensor, Tensor]:
        folded = (jacobian_determinant(state["displacement"]) <= 0).flatten(1).float().mean(1)
        dice = torch.full_like(folded, torch.nan)
        if self.dice_reward and "fixed_label" in state:
            known = labelled(state["fixed_label"], state["moving_label"])
            moved, fixed = (state[f"{role}_label"].clamp(min=0) for role in ("moving", "fixed"))
            moved = self.warp_label(moved.float(), self.output(state)).round()
            dice = dice.where(~known, mean_label_dice(moved, fixed, nested=self.nested_labels))
        similarity = dice
        if dice.isnan().any():  # no labels, or none in this fixed image
            similarity = torch.where(dice.isnan(), self.similarity(state["moved"], state["fixed"]), dice)
        return similarity - self.fold_penalty * folded, dice

    def _soft_dice(self, state: State, field: Tensor) -> Tensor:
        known = labelled(state["fixed_label"], state["moving_label"])
        values = torch.unique(state["fixed_label"][known])
        values = values[values > 0].reshape(1, -1, *[1] * self.spatial_dims)
        if values.numel() == 0:  # nothing labelled in these fixed images
            return field.sum() * 0
        region = torch.ge if self.nested_labels else torch.eq
        moving, fixed = (region(state[f"{role}_label"], values).float() for role in ("moving", "fixed"))
        moved = (self.dice_sharpness * self.warp(moving, field)).clamp(max=1.0)
        dice: Tensor = self.dice(moved[known], fixed[known])
        return dice
