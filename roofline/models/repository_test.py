import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.errors import DownloadError, UnsupportedError, UsageError
from roofline.models.repository import (
    RepoReference,
    check_revision,
    gguf_models,
    model_files,
    safetensors_weights,
)

FOLDER = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
QUANTS = ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-F16.gguf", "README.md"]


def shards(count: int, stem: str = "model", suffix: str = "safetensors") -> list[str]:
    return [f"{stem}-{index:05}-of-{count:05}.{suffix}" for index in range(1, count + 1)]


def chosen(names: list[str], reference: str) -> str:
    parsed = RepoReference.parse(reference)
    assert parsed is not None
    return model_files(names, parsed).main


@pytest.mark.parametrize(
    ("text", "repo", "quant"),
    [
        ("org/repo", "org/repo", None),
        ("org/Repo-1.5B_x:Q4_K_M", "org/Repo-1.5B_x", "Q4_K_M"),
        ("a/b:q8_0", "a/b", "q8_0"),
        ("a/b:UD-Q4_K_XL", "a/b", "UD-Q4_K_XL"),
    ],
)
def test_reference_is_a_repository_and_perhaps_a_quantisation(
    text: str, repo: str, quant: str | None
) -> None:
    reference = RepoReference.parse(text)
    assert reference == RepoReference(repo, quant)
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    [
        *("repo", "a/b/c", "/a/b", "./a/b", "../a", "a/..", "a/../b", "a..b/c", "a/b--c", "~/x"),
        *("a/b:", ":Q8_0", "a/b:Q8/0", "a/b:../x", "a/b c", "a/b\n", "a\\b", "a/\0b", "é/b", ""),
        *("folder/model.gguf", "folder/model.bin", "a/model.safetensors", "a/b.git", "a/b."),
        *(f"{'x' * 97}/b", f"a/{'x' * 97}", "http://host/a", "C:/models"),
    ],
)
def test_what_cannot_be_a_repository_is_none(text: str) -> None:
    assert RepoReference.parse(text) is None


@given(st.text("ab./\\:-_~Q0\0\n é", max_size=12))
def test_no_reference_leads_out_of_a_folder(text: str) -> None:
    if (reference := RepoReference.parse(text)) is not None:
        parts = reference.repo.split("/")
        assert len(parts) == 2 and ".." not in text and "\\" not in text
        assert all(part.strip(".") for part in parts)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/3", "a" * 40, "1.0+x"])
def test_branches_tags_and_commits_are_revisions(revision: str | None) -> None:
    check_revision(revision)


@pytest.mark.parametrize(
    "revision", ["", "../x", "a/../b", "/etc", "a//b", "-x", "a b", "a\n", "x" * 300, "a\\b"]
)
def test_what_would_lead_elsewhere_is_no_revision(revision: str) -> None:
    with pytest.raises(UsageError, match="must be a branch, a tag or a commit hash") as raised:
        check_revision(revision)
    assert len(raised.value.message) < 200 and "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("asked", "file"),
    [
        ("o/m", "m-Q8_0.gguf"),
        ("o/m:Q4_K_M", "m-Q4_K_M.gguf"),
        ("o/m:q4_k_m", "m-Q4_K_M.gguf"),
        ("o/m:f16", "m-F16.gguf"),
        ("o/m:m-F16", "m-F16.gguf"),
    ],
)
def test_gguf_file_is_chosen_by_quantisation(asked: str, file: str) -> None:
    assert chosen(QUANTS, asked) == file


@pytest.mark.parametrize("quant", ["Q4_K", "Q4", "Q5_K_M", "6", "K_M"])
def test_a_quantisation_is_a_whole_part_of_the_name(quant: str) -> None:
    with pytest.raises(UsageError) as raised:
        chosen(QUANTS, f"o/m:{quant}")
    assert raised.value.message == (
        f"o/m:{quant}: the repository has no GGUF file of '{quant}'; it has: F16, Q4_K_M, Q8_0"
    )


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["x.Q4_0.gguf", "x.Q4_K_M.gguf", "x.Q5_K_M.gguf"], "x.Q4_K_M.gguf"),
        (["x-BF16.gguf", "x-Q6_K.gguf"], "x-Q6_K.gguf"),
        (["whatever.gguf"], "whatever.gguf"),
        (["IQ2_XXS/x-IQ2_XXS.gguf", "mmproj-x-F16.gguf", "imatrix.gguf"], "IQ2_XXS/x-IQ2_XXS.gguf"),
        (["q8_0.gguf", "f32.gguf"], "q8_0.gguf"),
    ],
)
def test_without_a_quantisation_the_nearest_to_int8_is_taken(names: list[str], file: str) -> None:
    assert chosen(names, "o/m") == file


def test_what_leaves_a_choice_is_answered_with_the_names() -> None:
    both = ["a-7b-Q8_0.gguf", "a-13b-Q8_0.gguf"]
    for asked in ("o/m", "o/m:Q8_0"):
        with pytest.raises(UsageError, match=r"several GGUF files .*: a-13b-Q8_0, a-7b-Q8_0$"):
            chosen(both, asked)
    assert chosen(both, "o/m:a-7b-Q8_0") == chosen(both, "o/m:7b") == "a-7b-Q8_0.gguf"
    assert chosen(["x-UD-Q4_K_XL.gguf", "x-Q4_K_XL.gguf"], "o/m:Q4_K_XL") == "x-Q4_K_XL.gguf"
    assert chosen(["x-UD-Q4_K_XL.gguf"], "o/m:Q4_K_XL") == "x-UD-Q4_K_XL.gguf"
    with pytest.raises(UsageError, match=r"name one of: IQ1_S, IQ2_M$"):
        chosen(["x-IQ1_S.gguf", "x-IQ2_M.gguf"], "o/m")


def test_split_files_belong_together_and_a_part_alone_is_nothing() -> None:
    whole, part = shards(3, "big-Q8_0", "gguf"), shards(2, "big-F16", "gguf")[:1]
    assert gguf_models([*part, *reversed(whole)]) == {"Q8_0": tuple(whole)}
    files = model_files([*whole, *part], RepoReference("o/m"))
    assert (files.main, files.needed(weights=False)) == (whole[0], tuple(whole))


def test_safetensors_are_one_file_or_all_shards_of_the_index() -> None:
    index = "model.safetensors.index.json"
    assert safetensors_weights([*FOLDER, "model.safetensors", *shards(2), index]) == (
        "model.safetensors",
    )
    assert safetensors_weights([*FOLDER, *shards(2), index]) == (index, *shards(2))
    others = ["consolidated.safetensors", "adapter_model.safetensors", "a/model.safetensors"]
    for nothing in ([*FOLDER, *shards(3)[:2], index], [*FOLDER, *shards(2)], [*FOLDER, *others]):
        assert safetensors_weights(nothing) == ()
    assert safetensors_weights(["model.safetensors"]) == ()


def test_a_folder_is_what_is_read_and_nothing_else() -> None:
    more = ["pytorch_model.bin", "model.py", "original/x.pth", "chat_template.jinja", "merges.txt"]
    files = model_files([*FOLDER, *more, "model.safetensors", "m-Q8_0.gguf"], RepoReference("o/m"))
    assert files.main == ""
    assert files.weights == ("model.safetensors",)
    assert {*files.describing} == {*FOLDER, "chat_template.jinja"}
    assert files.describing[-1] == "config.json"  # with it, all that describes is there
    assert files.needed(weights=False) == files.describing


def test_of_both_kinds_a_quantisation_asks_for_gguf() -> None:
    both = [*FOLDER, "model.safetensors", *QUANTS]
    assert (chosen(both, "o/m"), chosen(both, "o/m:Q8_0")) == ("", "m-Q8_0.gguf")
    with pytest.raises(UsageError, match="no complete GGUF file; o/m is its safetensors model"):
        chosen([*FOLDER, "model.safetensors"], "o/m:Q8_0")


def test_a_repository_without_a_model_says_what_would_be_one() -> None:
    for names in (["README.md"], [*FOLDER], ["adapter_model.safetensors"]):
        with pytest.raises(UnsupportedError, match="neither a complete GGUF file nor"):
            chosen(names, "o/m")
    with pytest.raises(UnsupportedError, match=r"'pytorch_model\.bin' is a pickle, which is never"):
        chosen([*FOLDER, "pytorch_model.bin"], "o/m")


@pytest.mark.parametrize(
    "name",
    [
        *("../x.gguf", "a/../../x.gguf", "/etc/x.gguf", "a//x.gguf", "./x.gguf", "..", "a/.."),
        *("..\\x.gguf", "C:\\x.gguf", "c:x.gguf", "\\\\host\\x.gguf", "x\n.gguf", "x\0.gguf", ""),
    ],
)
def test_a_listed_file_outside_of_its_repository_is_refused(name: str) -> None:
    with pytest.raises(DownloadError, match="refused: it lists a file named") as raised:
        chosen([*QUANTS, name], "o/m")
    assert "\n" not in raised.value.message
