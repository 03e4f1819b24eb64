"""The norm modules keep fp32 weights and give back the dtype they got."""

import pytest
import torch
import torch.nn.functional as F

from moesaic.model.norm import LayerNorm, RmsNorm, make_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_starts_as_the_plain_norm(kind: str, dtype: torch.dtype) -> None:
    norm = make_norm(kind, 24, 1e-5)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = norm(x)
    plain = F.layer_norm if kind == "layernorm" else F.rms_norm
    assert out.dtype == dtype and norm.weight.dtype == torch.float32
    torch.testing.assert_close(out, plain(x.float(), (24,), eps=1e-5).to(dtype))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_scale_multiplies_what_comes_out(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    norm, plain = make_norm(kind, 24, 1e-5, scale=0.3), make_norm(kind, 24, 1e-5)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(3, 5, 24, generator=generator)
    torch.testing.assert_close(norm(x), 0.3 * plain(x))


def test_epsilon_is_used() -> None:
    x = torch.full((1, 4), 1e-3)
    for norm in (RmsNorm(4, epsilon=1.0), LayerNorm(4, epsilon=1.0)):
        assert norm(x).abs().max() <= 1e-3
