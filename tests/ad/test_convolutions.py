"""Convolutions in loops are in the form that is fast there, whatever form the model and its gradient have them in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import numbers

from numpyro_rad import rad
from numpyro_rad.ad import _jax
from numpyro_rad.ad.convolutions import fast_in_loops
from numpyro_rad.planning.costs import CPU, H200

KEY = jax.random.key(0)


def convolutions(jaxpr, inside=False):
    """The dimension numbers of all convolutions in the loops and calls of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated" and inside:
            yield equation.params["dimension_numbers"]
        for body in _jax.inner_jaxprs(equation):
            yield from convolutions(body.jaxpr, True)


def is_fast(form):
    last = len(form.lhs_spec) - 1
    space = tuple(range(1, last))
    return form == lax.ConvDimensionNumbers((0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space))


CASES = {
    "channels first": ((2, 3, 8, 8), (4, 3, 3, 3), ("NCHW", "OIHW", "NCHW"), {}),
    "channels last": ((2, 8, 8, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), {}),
    "something else": ((8, 2, 3, 8), (3, 4, 3, 3), ("HNCW", "IOWH", "WCHN"), {}),
    "strides and dilation": (
        (2, 9, 8, 3),
        (3, 2, 3, 4),
        ("NHWC", "HWIO", "NHWC"),
        {"strides": (2, 1), "dilate": (1, 2)},
    ),
    "transposed": ((2, 5, 5, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), {"lhs": (2, 2)}),
    "groups": ((2, 8, 8, 4), (3, 3, 2, 6), ("NHWC", "HWIO", "NHWC"), {"groups": 2}),
    "a series": ((2, 3, 8), (4, 3, 3), ("NCH", "OIH", "NCH"), {}),
    "a volume": ((2, 4, 5, 6, 3), (2, 2, 2, 3, 4), ("NHWDC", "HWDIO", "NHWDC"), {}),
}


def convolve(x, w, form, strides=None, dilate=None, lhs=None, groups=1):
    n = len(form[0]) - 2
    return lax.conv_general_dilated(
        x,
        w,
        strides or (1,) * n,
        [(1, 1)] * n,
        lhs_dilation=lhs,
        rhs_dilation=dilate,
        dimension_numbers=form,
        feature_group_count=groups,
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", CASES)
def test_a_program_computes_the_same_with_its_convolutions_in_that_form(case):
    """Those of a gradient, inside of a loop in a branch in a loop; those outside are left alone."""
    shape, kernel, form, more = CASES[case]
    x, w = numbers(*shape), numbers(*kernel)

    def inner(w, x):
        return jnp.tanh(convolve(x, w, form, **more)).sum()

    def f(w, x):
        def step(total, i):
            own = lax.cond(i > 0, lambda: jax.grad(inner)(w * i, x), lambda: w)
            again = lax.scan(lambda c, i: (c + jax.jit(jax.grad(inner, 1))(w, x + i), None), x, jnp.arange(2.0))[0]
            return total + own.sum() + again.sum(), None

        return lax.scan(step, inner(w, x), jnp.arange(3.0))[0]

    before = jax.make_jaxpr(f)(w, x)
    after = fast_in_loops(before)
    assert not all(map(is_fast, convolutions(before.jaxpr)))
    found = list(convolutions(after.jaxpr))
    assert len(found) == len(list(convolutions(before.jaxpr))) and all(map(is_fast, found))
    outside = [[e.params for e in j.jaxpr.eqns if e.primitive.name == "conv_general_dilated"] for j in (before, after)]
    assert len(outside[0]) == 1 and str(outside[0]) == str(outside[1])
    np.testing.assert_allclose(*(_jax.evaluate(j, [w, x])[0] for j in (before, after)), rtol=1e-12)
    plain = jax.make_jaxpr(inner)(w, x)
    assert fast_in_loops(plain) is plain


def test_convolutions_of_slices_are_in_that_form_on_a_cpu_alone():
    x, w = numbers(16, 2, 8, 8), numbers(3, 2, 3, 3)

    def f(w, x):
        return jnp.tanh(lax.conv(x, w, (1, 1), "SAME")).sum()

    def found(table, **options):
        g = rad(f, exact=True, costs=table, **options)
        return list(convolutions(jax.make_jaxpr(jax.grad(g, argnums=1))(KEY, w, x).jaxpr))

    assert len(found(CPU, slices=4)) >= 2 and all(map(is_fast, found(CPU, slices=4)))
    assert found(H200, slices=4) and not all(map(is_fast, found(H200, slices=4)))
    compiled = jax.jit(jax.grad(rad(f, exact=True, slices=4), argnums=1)).lower(KEY, w, x).compile().as_text()
    labels = {
        line.split("dim_labels=")[1].split(",")[0].split()[0] for line in compiled.splitlines() if "dim_labels" in line
    }
    assert labels == {"b01f_01io->b01f"}
