import pytest
import transformers

from roofline.models.families import FAMILIES, Family, gguf_architectures, gguf_family


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_names_are_those_of_transformers(family: Family) -> None:
    model = getattr(transformers, family.transformers_class)
    assert model.config_class.model_type == family.model_type


def test_a_gguf_name_that_families_share_goes_to_the_one_that_fits() -> None:
    assert gguf_architectures() == ["llama", "qwen2", "qwen3"]
    for architecture in gguf_architectures():
        assert gguf_family(architecture, windowed=False) == FAMILIES[architecture]
    assert gguf_family("llama", windowed=True) == FAMILIES["mistral"]
    assert gguf_family("qwen3", windowed=True) == FAMILIES["qwen3"]
