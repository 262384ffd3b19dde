"""What stands around the transformer: where its parts lie, the text encoder, the VAE, the image condition.

They come from transformers and diffusers, the extra `pipeline`; nothing here is imported before it is needed.
"""
