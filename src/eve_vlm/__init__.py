"""EVE, the encoder-free vision-language model: run it, train it, evaluate it.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`,
`AutoProcessor`, `AutoImageProcessor` and `pipeline("image-text-to-text")` know the model.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .alignment_eve import EveForPreTraining, EvePatchAligner
from .configuration_eve import EveAlignmentConfig, EveConfig, EveVisionConfig
from .efficientnet_lite import EfficientNetLite0, EfficientNetLite0Config
from .encoder_twin_eve import EveEncoder, EveEncoderConfig
from .image_processing_eve import EveImageProcessor, eve_grid, num_image_tokens
from .loading import load
from .modeling_eve import EveForConditionalGeneration, EveModel
from .patch_embedding_eve import EvePatchEmbedding
from .processing_eve import EveProcessor
from .record_attention import register as register_record_attention

__version__ = "0.1.0"


def register() -> None:
    """Registers the classes with the library's Auto classes; may be called again."""
    register_record_attention()
    AutoConfig.register("eve", EveConfig, exist_ok=True)
    AutoModel.register(EveConfig, EveModel, exist_ok=True)
    # The parts of an encoder-based twin, which is an EVE model in everything else.
    AutoConfig.register("eve_encoder", EveEncoderConfig, exist_ok=True)
    AutoModel.register(EveEncoderConfig, EveEncoder, exist_ok=True)
    AutoConfig.register("efficientnet_lite0", EfficientNetLite0Config, exist_ok=True)
    AutoModel.register(EfficientNetLite0Config, EfficientNetLite0, exist_ok=True)
    AutoModelForImageTextToText.register(EveConfig, EveForConditionalGeneration, exist_ok=True)
    AutoModelForPreTraining.register(EveConfig, EveForPreTraining, exist_ok=True)
    AutoProcessor.register(EveConfig, EveProcessor, exist_ok=True)
    try:
        AutoImageProcessor.register(
            EveConfig, image_processor_classes={"pil": EveImageProcessor}, exist_ok=True
        )
    except ImportError:
        # transformers 5.17 asks for torchvision to touch AutoImageProcessor at all; its mapping
        # does not.
        IMAGE_PROCESSOR_MAPPING.register(EveConfig, {"pil": EveImageProcessor}, exist_ok=True)


register()

__all__ = [
    "EveAlignmentConfig",
    "EveConfig",
    "EveEncoder",
    "EveEncoderConfig",
    "EveForConditionalGeneration",
    "EveForPreTraining",
    "EveImageProcessor",
    "EveModel",
    "EvePatchAligner",
    "EvePatchEmbedding",
    "EveProcessor",
    "EveVisionConfig",
    "eve_grid",
    "load",
    "num_image_tokens",
    "register",
]
