"""The baseline for text to image: diffusers' own pipeline, as most web servers run it."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from flowturbo.latents import noise

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DiffusersPipeline:
    """`StableDiffusion3Pipeline` of a folder without T5, on the CPU with `threads` threads.

    One request runs at a time: the scheduler of a pipeline has the state of a request.
    """

    def __init__(self, folder: Path, threads: int, precision: str = "fp32") -> None:
        torch.set_num_threads(threads)
        kind = PRECISIONS[precision]
        self._pipe: Any = StableDiffusion3Pipeline.from_pretrained(
            folder, dtype=kind, text_encoder_3=None, tokenizer_3=None, local_files_only=True
        )
        self._pipe.set_progress_bar_config(disable=True)
        side = self._pipe.transformer.config.sample_size
        self._shape = (self._pipe.transformer.config.in_channels, side, side)
        self._kind, self._lock = kind, threading.Lock()

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance_scale: float
    ) -> np.ndarray:
        """Images [n, H, W, 3] uint8 of `prompts` from `seeds`, [n] each: Euler on a uniform grid.

        The start is the service's noise, and the text has no rows for the absent T5, as there.
        """
        latents = torch.from_numpy(noise(np.array(seeds, dtype=np.int64), self._shape))
        with self._lock:
            made = self._pipe(
                prompt=list(prompts),
                sigmas=np.linspace(1, 1 / steps, steps).tolist(),
                guidance_scale=guidance_scale,
                latents=latents.to(self._kind),
                max_sequence_length=0,
                output_type="np",
            ).images
        return np.round(np.asarray(made, dtype=np.float32) * 255).astype(np.uint8)
