"""Full-size models in other sizes than the table's."""

from __future__ import annotations

from benchmarks.models import Sizes, cases_of, model_path, takes_a_text


def test_each_length_of_a_text_is_a_case_of_one_model() -> None:
    sizes = Sizes(batch=2, lengths=(16, 512))

    shapes = {case: {array.shape for array in inputs.values()} for case, inputs in cases_of("bert_base", sizes).items()}

    assert shapes == {"16 tokens": {(2, 16)}, "512 tokens": {(2, 512)}}
    assert model_path("bert_base", sizes=sizes).name == "bert_base_dynamo_batch2_any_length.onnx"


def test_images_spectra_and_pairs_of_texts_have_no_length_that_varies() -> None:
    texts = {
        name for name in ("bert_base", "resnet_50", "whisper_tiny_encoder", "clip_vit_base_32") if takes_a_text(name)
    }

    assert texts == {"bert_base"}
