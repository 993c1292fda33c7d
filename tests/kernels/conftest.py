from __future__ import annotations

import pytest

from headway.kernels import library

needs_library = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")
INSTRUCTION_SETS = ("plain C", "AVX2", "AVX-512")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each instruction set that the processor has, in turn."""
    if not library.available():
        pytest.skip(f"native kernels: {library.why_not()}")
    if library.instruction_set(request.param) != request.param:
        library.instruction_set()
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.instruction_set()
