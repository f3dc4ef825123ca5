"""Finds the family of a diffusers folder."""

from flowturbo.nets.families import flux2, rectified_flow, sd3, z_image
from flowturbo.nets.families.family import Family, FolderOptions
from flowturbo.nets.families.folder import DiffusersFolder
from flowturbo.nets.weights import CheckpointError

_LOADERS = {
    "StableDiffusion3Pipeline": sd3.load,
    "StableDiffusionPipeline": rectified_flow.load,
    "Flux2KleinPipeline": flux2.load,
    "ZImagePipeline": z_image.load,
}


def load_family(options: FolderOptions) -> Family:
    """The model in a diffusers folder, in float32. Raises CheckpointError."""
    folder = DiffusersFolder(options.path, options.network_file)
    if folder.pipeline not in _LOADERS:
        raise CheckpointError(
            f"{options.path} is a {folder.pipeline}; supported are {', '.join(_LOADERS)}"
        )
    return _LOADERS[folder.pipeline](folder, options)
