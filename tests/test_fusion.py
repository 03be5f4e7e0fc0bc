import pytest
import torch
from torch import nn

from hff_modules.fusion import (
    ConcatProjection,
    HierarchicalConv,
    HierarchicalFusion,
    LastLayer,
    WeightedSum,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomise(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


STATES = torch.randn(5, 2, 7, 12, generator=torch.Generator().manual_seed(0))
MAKERS = {
    "last": lambda k: LastLayer(k, 12),
    "weighted_sum": lambda k: WeightedSum(k, 12),
    "weighted_sum_norm": lambda k: WeightedSum(k, 12, layer_norm=True),
    "concat": lambda k: ConcatProjection(k, 12, 6),
    "concat_norm": lambda k: ConcatProjection(k, 12, 6, layer_norm=True),
    "hconv": lambda k: HierarchicalConv(max(k, 3), 12),
    "hff_concat": lambda k: HierarchicalFusion(k, 12, 4, 6),
    "hff_gated": lambda k: HierarchicalFusion(k, 12, 4, 6, merge="gated"),
    "hff_conv": lambda k: HierarchicalFusion(k, 12, 4, 6, merge="conv"),
    "hff_residual": lambda k: HierarchicalFusion(k, 12, 4, residual=True),
    "hff_residual_plain": lambda k: HierarchicalFusion(k, 12, 4, layer_norm=False, residual=True),
    "hff_plain": lambda k: HierarchicalFusion(k, 12, 4, 6, layer_norm=False, activation="relu"),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("num_states", [1, 2, 3, 4, 5, 7, 13])
def test_any_number_of_states_gives_the_width_that_is_announced(name, num_states):
    fusion = MAKERS[name](num_states)
    states = torch.randn(fusion.num_states, 2, 7, 12)
    assert fusion(states).shape == (2, 7, fusion.output_size)
    assert fusion(states, torch.tensor([7, 4])).shape == (2, 7, fusion.output_size)


@pytest.mark.parametrize("name", MAKERS)
def test_every_parameter_gets_a_gradient_and_every_used_state_matters(name):
    fusion = randomise(MAKERS[name](5))
    states = STATES.clone().requires_grad_()
    (fusion(states) ** 3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())
    moved = states.grad.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == ([False] * 4 + [True] if name == "last" else [True] * 5)


@pytest.mark.parametrize("name", MAKERS)
def test_padding_does_not_reach_the_valid_frames(name):
    fusion = randomise(MAKERS[name](5))
    padded = STATES.clone()
    padded[:, 1, 4:] = 99.0
    alone = fusion(STATES[:, 1:, :4], torch.tensor([4]))
    together = fusion(padded, torch.tensor([7, 4]))
    torch.testing.assert_close(together[1:, :4], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_states_of_another_number_or_width_are_refused(name):
    fusion = MAKERS[name](5)
    with pytest.raises(ValueError, match="made for 5 states"):
        fusion(STATES[:4])
    with pytest.raises(ValueError, match="width 12; given 11"):
        fusion(STATES[..., :11])


def test_weighted_sum_is_the_mean_at_first_and_the_softmax_formula_later():
    fusion = WeightedSum(5, 12)
    torch.testing.assert_close(fusion(STATES), STATES.mean(0))
    fusion.weights.data = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    weights = torch.exp(fusion.weights) / torch.exp(fusion.weights).sum()
    expected = sum(w * state for w, state in zip(weights, STATES, strict=True))
    torch.testing.assert_close(fusion(STATES), expected)
    assert fusion.layer_weights() == pytest.approx(weights.tolist())


def test_concat_projection_is_one_matrix_on_the_states_side_by_side():
    fusion = ConcatProjection(5, 12, 6)
    expected = torch.cat(list(STATES), dim=-1) @ fusion.projection.weight.T
    torch.testing.assert_close(fusion(STATES), expected)
    assert count(fusion) == 5 * 12 * 6


@pytest.mark.parametrize(
    ("num_states", "width", "parameters", "convolutions"),
    [(13, 768, 4_424_832, 2), (25, 1024, 6_990_165, 2)],
)
def test_hierarchical_conv_has_the_published_size(num_states, width, parameters, convolutions):
    fusion = HierarchicalConv(num_states, width)
    assert count(fusion) == parameters  # 4.42 M and 6.99 M in arXiv 2406.12209
    assert len(fusion.convolutions) == convolutions


def test_hierarchical_conv_equals_a_convolution_written_out_over_the_layer_axis():
    fusion = randomise(HierarchicalConv(5, 12))  # one convolution: 5 layers -> 2 positions
    weight, bias = fusion.convolutions[0].weight, fusion.convolutions[0].bias
    padded = torch.cat([torch.zeros(2, 2, 7, 12), STATES, torch.zeros(2, 2, 7, 12)])
    positions = []
    for start in (0, 3):
        window = padded[start : start + 5]
        positions.append(torch.relu(torch.einsum("kbti,oik->bto", window, weight) + bias))
    expected = torch.stack(positions, dim=-1).flatten(2)
    torch.testing.assert_close(fusion(STATES), expected, rtol=1e-4, atol=1e-4)


def test_hierarchical_conv_has_the_output_and_gradients_of_torch_convolutions():
    fusion = randomise(HierarchicalConv(13, 12))  # two: 13 layers -> 5 -> 2 positions
    states, names = torch.randn(13, 2, 7, 12), [name for name, _ in fusion.named_parameters()]
    hidden = states.permute(1, 2, 3, 0).flatten(0, 1)
    for convolution in fusion.convolutions:
        hidden = torch.relu(convolution(hidden))
    expected, features = hidden.reshape(2, 7, 12), fusion(states)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), fusion.parameters())
    found = torch.autograd.grad((features * direction).sum(), fusion.parameters())
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: name + m)


def test_a_residual_fusion_is_the_mean_of_normal_states_at_first_and_their_sum_with_the_hierarchy():
    fusion = HierarchicalFusion(5, 12, 4, residual=True)
    normal = nn.functional.layer_norm(STATES, (12,))
    torch.testing.assert_close(fusion(STATES), normal.mean(0))
    assert fusion.layer_weights() == pytest.approx([0.2] * 5)
    randomise(fusion)
    with torch.no_grad():
        fusion.weights.div_(100)
    plain = HierarchicalFusion(5, 12, 4)
    plain.load_state_dict({k: v for k, v in fusion.state_dict().items() if k != "weights"})
    shares = torch.tensor(fusion.layer_weights())
    torch.testing.assert_close(shares, torch.softmax(100 * fusion.weights.detach(), 0))
    expected = plain(STATES) + (shares[:, None, None, None] * normal).sum(0)
    torch.testing.assert_close(fusion(STATES), expected, rtol=1e-4, atol=1e-5)
    assert plain.layer_weights() is None and count(fusion) == count(plain) + 5
    with pytest.raises(ValueError, match="residual: output_size=6 must be input_size=12"):
        HierarchicalFusion(5, 12, 4, 6, residual=True)


def test_hierarchical_fusion_equals_its_formula_on_five_states():
    fusion = randomise(HierarchicalFusion(5, 12, 4, 6))
    gelu, parameters = nn.functional.gelu, dict(fusion.named_parameters())

    def norm(x, key):
        return nn.functional.layer_norm(
            x, x.shape[-1:], parameters[f"{key}.weight"], parameters[f"{key}.bias"]
        )

    def linear(x, key):
        return x @ parameters[f"{key}.weight"].T + parameters[f"{key}.bias"]

    def merge(a, b, key):
        return gelu(linear(norm(torch.cat([a, b], -1), f"{key}.norm"), f"{key}.linear"))

    u = [gelu(linear(norm(STATES[m], f"inputs.{m}.0"), f"inputs.{m}.1")) for m in range(5)]
    first, second = merge(u[0], u[1], "merges.0.0"), merge(u[2], u[3], "merges.0.1")
    left = merge(first, second, "merges.1.0")
    top = merge(left, u[4], "merges.2.0")  # the odd one moved up twice
    torch.testing.assert_close(fusion(STATES), linear(top, "output"), rtol=1e-4, atol=1e-5)


def test_gated_merge_is_between_its_two_inputs():
    fusion = randomise(HierarchicalFusion(2, 12, 4, 6, merge="gated"))
    low, high = (project(STATES[m]) for m, project in enumerate(fusion.inputs))
    merged = fusion.merges[0][0](low, high, None)
    assert (merged >= torch.minimum(low, high) - 1e-6).all()
    assert (merged <= torch.maximum(low, high) + 1e-6).all()


def test_hierarchical_fusion_has_the_size_of_the_closed_formula():
    states, width, hidden = 4, 768, 256
    into = states * (2 * width + width * hidden + hidden)
    merges = (states - 1) * (2 * 2 * hidden + 2 * hidden * hidden + hidden)
    out = hidden * width + width
    assert count(HierarchicalFusion(states, width, hidden)) == into + merges + out


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"merge": "sum"}, "merge='sum'.*concat, gated, conv"),
        ({"activation": "swoosh"}, "activation='swoosh'.*gelu"),
        ({"kernel_size": 4}, "kernel_size=4.*odd"),
    ],
)
def test_an_unknown_setting_is_refused_by_name(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        HierarchicalFusion(2, 12, **settings)


def test_too_few_states_are_refused():
    with pytest.raises(ValueError, match="at least 3 states"):
        HierarchicalConv(2, 12)
    with pytest.raises(ValueError, match="at least one state"):
        WeightedSum(0, 12)


def test_norms_taken_into_the_first_maps_change_neither_features_nor_gradients():
    torch.manual_seed(0)
    fusion = HierarchicalFusion(num_states=3, input_size=12, hidden_size=8)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    states = torch.randn(3, 2, 5, 12)

    def run():
        fusion.zero_grad()
        features = fusion(states)
        features.square().sum().backward()
        return features.detach(), [p.grad.clone() for p in fusion.parameters()]

    folded, gradients = run()
    fusion.inputs = torch.nn.ModuleList(torch.nn.Sequential(*part) for part in fusion.inputs)
    plain, expected = run()
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
