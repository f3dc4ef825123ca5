"""Triton Python-backend model: picks the latents of the images from an ensemble's rows."""

from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo import contract
from flowturbo.ensemble import conditional_rows
from flowturbo.generate import check_finite
from flowturbo.serving.triton_io import error_response


class TritonPythonModel:
    """Drops the unconditional rows: an ensemble has no step for that."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns the conditional rows of each request, or an error."""
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
