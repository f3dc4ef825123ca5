"""Triton Python-backend model: an ensemble's latent rows to the latents of its images."""

from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo import contract
from flowturbo.ensemble import conditional_rows
from flowturbo.generate import check_finite
from flowturbo.serving.triton_io import error_response


class TritonPythonModel:
    """Leaves the unconditional rows out, which no step of an ensemble can do by itself."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Every request's conditional rows, or what is wrong with them."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            rows, pair = (
                pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy()
                for spec in contract.FINISHER_INPUTS
            )
            latent = conditional_rows(rows, pair)
            check_finite(latent, "latent")
            wanted = request.requested_output_names()
            return pb_utils.InferenceResponse([pb_utils.Tensor(name, latent) for name in wanted])
        except Exception as error:
            return error_response("finisher", error)
