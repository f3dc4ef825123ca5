"""Model families: adapters from diffusers' folders to step blocks, text encoders and decoders.

Each family is one module with a function `load`. It reads the parts of a folder, wraps diffusers'
own networks, and states their conventions: time, sign, packing, grid and guidance.
"""
