"""vlm_jax: trains vision-language models with JAX and answers what matters when building one.

The package is lazy: `import vlm_jax` imports nothing heavy, so that data workers never load jax.
"""

__version__ = "0.1.0"


def load(workdir, **options):
    """Loads a trained run for inference; see `vlm_jax.inference.load`."""
    from vlm_jax import inference

    return inference.load(workdir, **options)
