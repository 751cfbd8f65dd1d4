"""Runs the norm's Triton kernels in Triton's interpreter and prints their errors against float64, one JSON object a case.

Started by test_norm_triton.py as its own process: TRITON_INTERPRET must be set before Triton is imported. New tensors are full of
NaN, so what a kernel does not write is seen.
"""

import json
import sys

import torch

from tests.kernels.norm_cases import errors, make_case, run

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for text in json.loads(sys.argv[1]):
        order, shape, dtype, scaled, strided = text
        case = make_case(tuple(shape), TYPES[dtype], scaled=scaled)
        if strided:
            turned = {name: getattr(case, name).mT.contiguous().mT for name in ("branch", "residual", "grad", "grad_total")}
            case = case.replace(**turned)
        found = run(order, case, "triton")
        again = run(order, case, "triton")
        same = all(torch.equal(found[name], again[name]) for name in found)
        sys.stdout.write(json.dumps({"errors": errors(found, run(order, case.double(), "reference")), "same": same}) + "\n")


if __name__ == "__main__":
    main()
