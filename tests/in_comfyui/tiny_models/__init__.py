"""A tiny model of every class that ComfyUI knows, by the name of the class."""

from . import images, others, unets, videos
from .row import TinyModel

MODELS: dict[str, TinyModel] = {
    model.host_class: model for family in (unets, images, videos, others) for model in family.MODELS
}
