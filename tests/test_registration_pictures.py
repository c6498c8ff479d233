from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from results import make_result

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_rl_reg.registration_pictures import HEIGHT, RegistrationPictures, draw_pair
from monai_rl_reg.transforms import WarpByDisplacementd


def make_pair(spatial_dims: int = 3, *, labels: bool = True, share: float = 1.0) -> dict[str, Any]:
    """A pair as validation's postprocessing leaves it, moved by this share of the true displacement."""
    result, _ = make_result(spatial_dims, size=24, steps=1)
    pair: dict[str, Any] = {"image": result.working, "pred": share * result.history[-1]}
    if labels:
        assert result.fixed_label is not None
        assert result.moved_label is not None
        stack = torch.cat([result.fixed_label.as_tensor(), result.moved_label.as_tensor()])
        pair["label"] = MetaTensor(stack.float(), affine=result.fixed.affine)
    return WarpByDisplacementd()(pair)  # type: ignore[return-value]


def columns(picture: np.ndarray, count: int) -> list[np.ndarray]:
    return np.array_split(picture.astype(int), count, axis=1)


def test_the_first_pairs_are_written_at_every_validation(tmp_path: Path) -> None:
    pairs = [make_pair(share=share) for share in (0.0, 0.5, 1.0)]

    def validate(engine: Engine, batch: Any) -> list[dict[str, Any]]:
        engine.state.batch = [{"image": pair["image"]} for pair in batch]
        return [{key: value for key, value in pair.items() if key != "image"} for pair in batch]

    for shape in ([pairs[:1], pairs[1:2], pairs[2:]], [pairs]):  # a pair a batch, and all in one
        folder = tmp_path / str(len(shape))
        engine = Engine(validate)
        RegistrationPictures(str(folder), pairs=2).attach(engine)
        assert not folder.exists()  # nothing before the first validation
        for epoch in (4, 8):
            engine.state.max_epochs, engine.state.epoch = epoch, epoch - 1  # as MONAI's ValidationHandler does
            engine.run(shape, max_epochs=epoch)
        events = EventAccumulator(str(folder))
        events.Reload()
        assert events.Tags()["images"] == ["validation_pair_0", "validation_pair_1"]
        for number in (0, 1):
            images = events.Images(f"validation_pair_{number}")
            assert [image.step for image in images] == [4, 8]
            with Image.open(io.BytesIO(images[0].encoded_image_string)) as written:
                np.testing.assert_array_equal(np.asarray(written), draw_pair(pairs[number]))


@pytest.mark.parametrize(("spatial_dims", "labels"), [(3, True), (3, False), (2, True), (2, False)])
def test_a_picture_has_a_row_a_plane_and_a_column_a_kind(spatial_dims: int, labels: bool) -> None:
    picture = draw_pair(make_pair(spatial_dims, labels=labels))
    rows, kinds = (3 if spatial_dims == 3 else 1), (8 if labels else 6)
    assert picture.shape == (rows * HEIGHT + 24, kinds * HEIGHT, 3)
    assert picture.dtype == np.uint8
    kinds_shown = columns(picture, kinds)
    assert all(kind.max() > 100 for kind in kinds_shown)
    before, after = (np.ptp(kinds_shown[i][24:], axis=-1).mean() for i in (3, 4))
    assert after < 0.6 * before


def test_labels_of_a_pair_without_any_are_left_out() -> None:
    pair = make_pair()
    for key in ("fixed_label", "moving_label", "moved_label"):
        pair[key] = torch.zeros_like(pair[key])
    assert draw_pair(pair).shape[1] == 6 * HEIGHT
