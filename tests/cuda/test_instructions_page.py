"""The way through a listing that tools/gpu_instructions.py counts, and that its page is current."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvcore.errors import BackendUnavailable
from kvcore_gpu import nvrtc

TOOL = Path(__file__).parents[2] / "tools" / "gpu_instructions.py"
#: A loop of which one round leaves the copy out, and another goes over a maximum that has grown.
LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0040*/                   LDG.E R3, desc[UR4][R4.64] ;
.L_x_2:
        /*0050*/                   FMNMX R5, R6, R7, !PT ;
        /*0060*/               @P3 BRA `(.L_x_2) ;
        /*0070*/              @!P1 BRA `(.L_x_3) ;
        /*0080*/                   FMUL R8, R8, R9 ;
        /*0090*/                   BRA `(.L_x_4) ;
        /*00a0*/                   FMUL R8, R8, R9 ;
.L_x_3:
        /*00b0*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
.L_x_4:
        /*00c0*/                   BRA P2, `(.L_x_1) ;
        /*00d0*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_instructions", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_way_of_a_round(tool):
    code = tool.parse(LISTING)
    assert code[3].opcode == "LDGSTS" and code[2].following == (3, 5)
    assert code[9].following == (12,)  # which goes nowhere else
    assert tool.round_of(code, 1, products=1) == (1, 1, -9)
    assert tool.count_round(code, products=1) == 9
    with pytest.raises(ValueError, match="no loop with 2 products"):
        tool.count_round(code, products=2)


@pytest.mark.slow
def test_the_page_is_current(tool):
    try:
        nvrtc.load()
        tool.find_nvdisasm()
    except (BackendUnavailable, FileNotFoundError) as error:
        pytest.skip(str(error))
    assert tool.PAGE.read_text() == tool.table(), "run tools/gpu_instructions.py"
