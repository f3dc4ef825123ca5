"""Triton Python-backend model: the last step of an ensemble, which refuses non-finite images."""

from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo import contract
from flowturbo.generate import check_finite
from flowturbo.serving.triton_io import error_response


class TritonPythonModel:
    """Makes an image that is not finite an error, never a black picture."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns the images of each request, or an error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            image, magnitude = (
                pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy()
                for spec in contract.CHECKER_INPUTS
            )
            check_finite(magnitude, "image")
            (output,) = contract.CHECKER_OUTPUTS
            return pb_utils.InferenceResponse([pb_utils.Tensor(output.name, image)])
        except Exception as error:
            return error_response("checker", error)
