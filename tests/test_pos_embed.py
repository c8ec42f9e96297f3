"""The sine-cosine table of oblong grids, and the resampling of tables. test_fidelity.py has the published table."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from util.pos_embed import resample_pos_embed, sincos_pos_embed


@pytest.mark.parametrize(("width", "grid"), [(192, (14, 7)), (16, (2, 3))])
def test_table_of_an_oblong_grid_is_hugging_faces_with_the_column_first(width, grid):
    row_first = build_2d_sinusoidal_position_embedding(*grid, width)
    column_first = row_first.roll(width // 2, dims=-1)  # the order in MAE's weights
    table = sincos_pos_embed(width, grid, num_prefix=2)
    assert table.dtype == torch.float32 and (table[0, :2] == 0).all()
    torch.testing.assert_close(table[0, 2:], column_first.view(-1, width), atol=1e-5, rtol=0)


def test_a_width_that_4_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="needs a width divisible by 4, not 18"):
        sincos_pos_embed(18, (2, 2), 1)


@pytest.mark.parametrize("new", [(4, 4), (7, 7), (2, 3), (9, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resampling_is_timms_to_the_bit(new, dtype):
    torch.manual_seed(0)
    table = torch.randn(1, 2 + 16, 8).to(dtype)
    expected = resample_abs_pos_embed(table, new, (4, 4), num_prefix_tokens=2)
    assert resample_pos_embed(table, (4, 4), new, num_prefix=2).equal(expected)
