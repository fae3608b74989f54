"""The reader of compiled programs: its grammar, and how often loops run."""

import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.train.hlo import Shape, read_program, read_shapes

# A kernel's metadata as libtpu prints it: raw, over several lines, with what looks like the next instruction.
KERNEL = r"""HloModule jit_f, is_scheduled=true

%helper (x: f32[]) -> f32[] {
  ROOT %x = f32[]{:T(128)} parameter(0)
}

ENTRY %main.1 (a: bf16[8,128], b: bf16[8,128]) -> (bf16[8,128], f32[8]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="batch[\'a\']"}
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %kernel.2 = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)S(1)}) custom-call(%a, /*index=1*/%b), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,128]{1,0}, bf16[8,128]{1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block\": 512, \"calls=%wrong\": {}"
  %fake = f32[] add(%a, %b), calls=%wrong
}
}}, metadata={op_name="jit(f)/kernel, body=%wrong" stack_frame_id=1}, backend_config={"custom_call_config":{"body":"QUJD","cost_estimate":{"flops":"7"}},"estimated_cycles":"12"}
  ROOT %tuple = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)S(1)}) tuple(%a, %kernel.2)
}
"""  # noqa: E501


def test_kernel_metadata_with_newlines_braces_and_quotes():
    program = read_program(KERNEL)
    assert program.name == "jit_f"
    assert program.entry == "main.1"
    assert program.for_tpu
    main = program.computations["main.1"]
    assert [each.name for each in main.instructions] == ["a", "b", "kernel.2", "tuple"]
    kernel = main.by_name["kernel.2"]
    assert kernel.opcode == "custom-call"
    assert kernel.operands == ("a", "b")
    assert kernel.cycles == 12
    assert kernel.shapes == (Shape("bf16", (8, 128)), Shape("f32", (8,)))
    assert kernel.attribute("custom_call_target") == "tpu_custom_call"
    assert kernel.op_name == "jit(f)/kernel, body=%wrong"
    assert kernel.attribute("body") is None
    assert kernel.attribute("nothing") is None
    assert json.loads(kernel.config)["custom_call_config"]["cost_estimate"] == {"flops": "7"}
    assert main.root is main.by_name["tuple"]
    assert main.parameters[1].name == "b"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40))
def test_whatever_a_string_holds_the_rest_is_read(text):
    written = json.dumps(text)
    program = read_program(
        "HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n"
        f"  %q = f32[4]{{0}} negate(%p), metadata={{op_name={written}}}, to_apply=%p\n"
        "  ROOT %r = f32[4]{0} copy(%q)\n}\n"
    )
    q, r = program.computations["main"].instructions[1:]
    assert (q.operands, q.names("to_apply"), r.operands) == (("p",), ("p",), ("q",))
    assert q.op_name == written[1:-1]


def test_shapes():
    tuple_type = (
        "(s32[]{:T(128)}, /*index=1*/pred[8,3]{1,0:T(8,128)(4,1)S(1)}, s4[3]{0}, f8e4m3fn[<=16,2]{1,0})"
    )
    shapes = read_shapes(tuple_type)
    assert [str(shape) for shape in shapes] == ["s32[]", "pred[8,3]", "s4[3]", "f8e4m3fn[16,2]"]
    assert [shape.bytes for shape in shapes] == [4, 24, 2, 32]


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("nothing of the kind")


LOOP = """HloModule m

%body (c: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {{
  %c = (s32[], s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=1
  %x = f32[4]{{0}} get-tuple-element(%c), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  ROOT %t = (s32[], s32[], f32[4]{{0}}) tuple(%next, %limit, %x)
}}

%condition (c: (s32[], s32[], f32[4])) -> pred[] {{
  %c.1 = (s32[], s32[], f32[4]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %limit.1 = s32[] get-tuple-element(%c.1), index=1
  %constant.1 = s32[] constant({limit})
  ROOT %compare = pred[] compare({operands}), direction={direction}
}}

ENTRY %main (x: f32[4], n: s32[]) -> f32[4] {{
  %x.1 = f32[4]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %first = s32[] constant({first})
  %moved = s32[] copy(%first)
  %limit.2 = s32[] constant({limit})
  %t.1 = (s32[], s32[], f32[4]{{0}}) tuple({start}, {end}, %x.1)
  %loop = (s32[], s32[], f32[4]{{0}}) while(%t.1), condition=%condition, body=%body
  ROOT %y = f32[4]{{0}} get-tuple-element(%loop), index=2
}}
"""


def _trips(first, limit, step, direction, operands="%i.1, %constant.1", start="%moved", end="%limit.2"):
    program = read_program(
        LOOP.format(
            first=first, limit=limit, step=step, direction=direction, operands=operands, start=start, end=end
        )
    )
    return program.trips(program.computations["main"].by_name["loop"])


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(-4, 4), st.sampled_from(["LT", "LE", "GT", "GE"]))
@settings(max_examples=80, deadline=None)
def test_trip_counts_are_those_of_running_the_loop(first, limit, step, direction):
    holds = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__}[direction]
    i, trips = first, 0
    while holds(i, limit) and trips < 50:
        i, trips = i + step, trips + 1
    # A loop that never ends, or whose counter leaves its limit, is none that counts.
    told = _trips(first, limit, step, direction)
    assert told == trips if told is not None else trips in (0, 50)
    mirrored = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}[direction]
    assert _trips(first, limit, step, mirrored, operands="%constant.1, %i.1") == told


def test_trip_counts_with_a_limit_that_the_loop_carries():
    assert _trips(2, 17, 5, "LT", operands="%i.1, %limit.1") == 3
    assert _trips(0, 4, 1, "NE", operands="%limit.1, %i.1") == 4


def test_loops_whose_trips_are_not_in_the_program():
    assert _trips(0, 5, 1, "LT", start="%n") is None
    assert _trips(0, 5, 1, "LT", operands="%i.1, %limit.1", end="%n") is None
    assert _trips(0, 5, 0, "LT") is None


def test_loops_of_a_compiled_program():
    def nested(x):
        inner = lambda carry, _: (jnp.tanh(carry @ carry), None)  # noqa: E731
        outer = lambda carry, _: (jax.lax.scan(inner, carry, None, length=5)[0] + 1, None)  # noqa: E731
        x = jax.lax.scan(outer, x, None, length=3)[0]
        return jax.lax.while_loop(lambda x: x.sum() < 1, jnp.sin, x)

    program = read_program(jax.jit(nested).lower(jnp.ones((8, 8))).compile().as_text())
    loops = [each for each in program.instructions() if each.opcode == "while"]
    assert sorted(program.trips(loop) or 0 for loop in loops) == [0, 3, 5]
    assert not program.for_tpu
