"""The chunked loss head against cross-entropy on whole logits: values, gradients, and what it must not do."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.loss import IGNORED, nats, sum_of_nats


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [part for part in self[:3] if part is not None]


def case(
    n: int, v: int, d: int = 8, *, bias: bool = True, ignored: Any = (), dtype: torch.dtype = torch.float32
) -> Case:
    generator = torch.Generator().manual_seed(n * 1000 + v)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    targets = torch.randint(0, v, (n,), generator=generator)
    targets[list(ignored)] = IGNORED
    return Case(draw(n, d), draw(v, d), draw(v) if bias else None, targets)


def whole(one: Case) -> Tensor:
    logits = F.linear(one.hidden, one.weight, one.bias)
    return F.cross_entropy(logits, one.targets, reduction="sum", ignore_index=IGNORED)


def off(a: Tensor, b: Tensor) -> float:
    """Return the distance of a from b as a share of b."""
    return float((a - b).norm() / b.norm())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    v=st.integers(2, 90),
    chunk=st.integers(1, 50),
    bias=st.booleans(),
    data=st.data(),
)
def test_loss_and_gradients_are_those_of_whole_logits(
    n: int, v: int, chunk: int, bias: bool, data: Any
) -> None:
    one = case(n, v, bias=bias, ignored=data.draw(st.sets(st.integers(0, n - 1))))
    expected, loss = whole(one), sum_of_nats(*one, torch.float32, chunk)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(value, one.inputs) for value in (loss, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    each = nats(*one, torch.float32, chunk)
    logits = F.linear(one.hidden, one.weight, one.bias)
    torch.testing.assert_close(
        each, F.cross_entropy(logits, one.targets, reduction="none"), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40), v=st.integers(20, 90), chunk=st.integers(1, 50), bias=st.booleans(), data=st.data()
)
def test_bf16_is_near(n: int, v: int, chunk: int, bias: bool, data: Any) -> None:
    one = case(n, v, bias=bias, ignored=data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))
    with torch.no_grad():  # no target so likely that its gradient is all rounding
        for part in one.inputs[1:]:
            part.mul_(0.3)
    expected, loss = whole(one), sum_of_nats(*one, torch.bfloat16, chunk)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    for a, b in zip(
        torch.autograd.grad(loss, one.inputs), torch.autograd.grad(expected, one.inputs), strict=True
    ):
        assert a.dtype == torch.float32
        assert off(a, b) < 0.03
    assert nats(*one, torch.bfloat16).sum().item() == pytest.approx(expected.item(), rel=0.02)


def test_the_mean_of_many_in_bf16_is_right_to_four_digits() -> None:
    one = case(2000, 3000, 32)
    one.weight.data.mul_(0.1)
    rounded = Case(*(part.detach().bfloat16().float() for part in one[:3]), one.targets)  # type: ignore[union-attr]
    with torch.no_grad():
        expected = whole(rounded).item() / 2000
    assert sum_of_nats(*one, torch.bfloat16).item() / 2000 == pytest.approx(expected, rel=2e-4)
    assert nats(*one, torch.bfloat16).mean().item() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_finite_differences(bias: bool) -> None:
    one = case(5, 7, 3, bias=bias, ignored={2}, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: sum_of_nats(
            inputs[0], inputs[1], inputs[2] if bias else None, one.targets, torch.float64, 2
        ),
        one.inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_padding_costs_nothing_and_teaches_nothing(dtype: torch.dtype) -> None:
    one = case(6, 11, ignored=range(6))
    loss = sum_of_nats(*one, dtype, 4)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, one.inputs):
        assert gradient.abs().max() == 0
    assert nats(*one, dtype).tolist() == [0] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_without_any_probability_is_dear_but_finite(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    loss = sum_of_nats(hidden, weight, None, torch.tensor([2]), dtype)
    assert loss.item() == pytest.approx(87.34, abs=0.01)
    assert nats(hidden, weight, None, torch.tensor([2]), dtype).item() == 600
    loss.backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [[2, 0]]
    assert weight.grad is not None and weight.grad.tolist() == [[300, 0], [0, 0], [-300, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype, value: float) -> None:
    one = case(5, 11)
    with torch.no_grad():
        one.hidden[3, 2] = value
    loss = sum_of_nats(*one, dtype, 2)
    assert torch.isnan(loss) and torch.isnan(nats(*one, dtype).sum())
    assert all(torch.isnan(gradient).any() for gradient in torch.autograd.grad(loss, one.inputs))


def test_gradients_follow_the_factor_and_can_be_taken_twice_but_not_of_themselves() -> None:
    one = case(9, 13)
    plain = torch.autograd.grad(sum_of_nats(*one), one.inputs)
    loss = sum_of_nats(*one)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(0.5 * loss, one.inputs, retain_graph=True), plain, strict=True):
            torch.testing.assert_close(a, 0.5 * b)
    first = torch.autograd.grad(loss, one.inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first[0].sum(), one.inputs)


class Watch(TorchDispatchMode):
    """Keep the shape and address of every matrix that comes to be, and how many products were made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.buffers: set[int] = set()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(out, Tensor) and out.ndim == 2:
            self.shapes.add(tuple(out.shape))
            if out.shape[1] == 1009:
                self.buffers.add(out.untyped_storage().data_ptr())
        return out


def test_logits_exist_in_one_buffer_of_a_chunk_only() -> None:
    one = case(70, 1009, bias=False)
    with Watch() as watch:
        sum_of_nats(*one, torch.bfloat16, 16).backward()  # type: ignore[no-untyped-call]
    assert {shape for shape in watch.shapes if shape[1] == 1009 and shape[0] != 8} == {(16, 1009), (6, 1009)}
    assert len(watch.buffers) == 2  # the logits of all chunks, and the weight transposed


@pytest.mark.parametrize(
    ("wanted", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_a_gradient_that_nobody_needs_is_not_made(wanted: tuple[bool, bool], products: int) -> None:
    one = case(6, 11, bias=False)
    for part, needed in zip(one.inputs, wanted, strict=True):
        part.requires_grad_(needed)
    with Watch() as watch:
        loss = sum_of_nats(*one)
    assert watch.products == products
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()  # type: ignore[no-untyped-call]
    assert [part.grad is not None for part in one.inputs] == list(wanted)


def test_without_gradients_there_is_the_value_only() -> None:
    one = case(30, 11, ignored={4})
    with torch.no_grad():
        alone = sum_of_nats(*one)
    assert not alone.requires_grad and not nats(*one).requires_grad
    torch.testing.assert_close(alone, sum_of_nats(*one).detach())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_torchs_own_chunked_loss_agrees() -> None:
    one = case(90, 700, 16, ignored={5, 60})
    native = F.linear_cross_entropy(
        one.hidden,
        one.weight,
        one.targets,
        linear_bias=one.bias,
        reduction="sum",
        ignore_index=IGNORED,
        options=torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=32, chunking_method=None, acc_policy="accurate"
        ),
    )
    ours = sum_of_nats(*one, torch.float32, 32)
    torch.testing.assert_close(ours, native)
    for a, b in zip(
        torch.autograd.grad(ours, one.inputs), torch.autograd.grad(native, one.inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
