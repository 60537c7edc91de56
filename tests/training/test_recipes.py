import inspect
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Generator

from registry.core.errors import NetworkImpossible, UsageError
from registry.model.networks import NETWORKS
from training.fitting.augment import augment, random_crop, random_erase, random_flip
from training.fitting.network_fit import fit_to_pictures
from training.fitting.parameters import NETWORK, TRAINING, Parameter
from training.fitting.recipes import RECIPES, Recipe, choose_recipe


def test_overrides_reach_the_recipe_and_its_network() -> None:
    recipe = choose_recipe(
        "cnn", ["epochs=3", "learning_rate=0.5", "filters=8,16", "pooling=average", "flip=true"]
    )
    assert (recipe.epochs, recipe.learning_rate, recipe.flip) == (3, 0.5, True)
    assert recipe.network.args["filters"] == [8, 16]
    assert recipe.network.args["pooling"] == "average"
    assert "filters" not in RECIPES["cnn"].network.args


def test_a_value_that_is_a_json_list_stays_one() -> None:
    assert choose_recipe("cnn", ["filters=[8, 16]"]).network.args["filters"] == [8, 16]


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("vgg", [], "no recipe 'vgg'; there are: dense, cnn, resnet"),
        ("cnn", ["epochs"], "write KEY=VALUE, for example --set epochs=20"),
        ("cnn", ["=3"], "write KEY=VALUE"),
        ("cnn", ["epochs=0"], r"--set epochs=0: .*>= 1 \(for example --set epochs=20\)"),
        ("cnn", ["epochs=many"], "--set epochs=many: Expected `int`"),
        ("cnn", ["precision=int4"], "--set precision=int4"),
        ("cnn", ["epohcs=3"], "there is no parameter epohcs; did you mean epochs?"),
        ("cnn", ["poolsize=1"], "did you mean pool_size?"),
        ("cnn", ["name=x"], "there is no parameter name"),
        ("cnn", ["widths=8"], "widths is a parameter of the network resnet; cnn has: epochs,"),
        ("cnn", ["zzz=1"], "there is no parameter zzz; cnn has: epochs"),
    ],
)
def test_an_unknown_recipe_or_a_wrong_override_is_refused(
    name: str, overrides: list[str], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        choose_recipe(name, overrides)


def test_the_code_and_the_documentation_have_the_same_parameters() -> None:
    fields = {field.name for field in msgspec.structs.fields(Recipe)} - {"name", "network"}
    assert {parameter.name for parameter in TRAINING} == fields
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for network, parameters in NETWORK.items():
        arguments = list(inspect.signature(NETWORKS[network]).parameters)[2:]
        assert {parameter.name for parameter in parameters} == set(arguments)
    for parameter in (*TRAINING, *(each for some in NETWORK.values() for each in some)):
        assert f"| `{parameter.name}` | {parameter.meaning} | `{parameter.setting}` |" in text


@pytest.mark.parametrize(
    ("recipe", "parameter"),
    [
        (recipe, parameter)
        for recipe in ("dense", "cnn", "resnet")
        for parameter in (*TRAINING, *NETWORK[recipe])
    ],
)
def test_every_example_of_a_parameter_works(recipe: str, parameter: Parameter) -> None:
    setting = f"{parameter.name}={parameter.example}"
    fit_to_pictures(choose_recipe(recipe, [setting]), 64)


@pytest.mark.parametrize("side_px", [8, 9, 16, 28, 224])
@pytest.mark.parametrize("recipe", ["dense", "cnn", "resnet"])
def test_the_default_recipes_fit_pictures_of_any_size(recipe: str, side_px: int) -> None:
    fit_to_pictures(choose_recipe(recipe), side_px)


def test_small_pictures_change_only_arguments_that_the_recipe_does_not_name() -> None:
    deep = ["filters=4,4,4,4,4"]
    assert fit_to_pictures(choose_recipe("cnn"), 28) == choose_recipe("cnn")
    fitted = fit_to_pictures(choose_recipe("cnn", deep), 8).network.args
    assert fitted["pool_size"] == [2, 2, 2, 1, 1]
    with pytest.raises(NetworkImpossible) as caught:
        fit_to_pictures(choose_recipe("cnn", [*deep, "pool_size=2"]), 8)
    assert caught.value.suggestion == "pool_size=2,2,2,1,2"


@pytest.mark.parametrize(
    ("recipe", "setting", "suggestion"),
    [
        ("cnn", "pool_size=99", "pool_size=64,99"),
        ("cnn", "pooling=mean", "pooling=max"),
        ("cnn", "stride=1,2,3", "stride=1,1"),
        ("cnn", "padding=-1", "padding=1"),
        ("cnn", "dropout=2", "dropout=0.3"),
        ("resnet", "widths=2,2,2,2,2,2,2,2,2", "widths=2,2,2,2,2,2,2"),
    ],
)
def test_the_error_about_a_network_that_cannot_be_built_suggests_a_setting(
    recipe: str, setting: str, suggestion: str
) -> None:
    with pytest.raises(NetworkImpossible) as caught:
        fit_to_pictures(choose_recipe(recipe, [setting]), 64)
    assert caught.value.suggestion == suggestion


def pixels(count: int = 64) -> torch.Tensor:
    return torch.randint(1, 255, (count, 8, 10, 3), dtype=torch.uint8, generator=seeded(9))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_a_flip_mirrors_about_half_of_the_pictures() -> None:
    before = pixels()
    after = random_flip(before, seeded())
    mirrored = (after == before.flip(2)).all(dim=(1, 2, 3))
    kept = (after == before).all(dim=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 16 < int(mirrored.sum()) < 48


def test_a_crop_is_a_window_of_the_padded_picture() -> None:
    before = pixels()
    after = random_crop(before, 2, seeded())
    padded = torch.nn.functional.pad(before, (0, 0, 2, 2, 2, 2))
    offsets = [(top, left) for top in range(5) for left in range(5)]
    found = set()
    for number in range(len(before)):
        matches = [
            (top, left)
            for top, left in offsets
            if (padded[number, top : top + 8, left : left + 10] == after[number]).all()
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 15


def test_erasing_touches_one_rectangle_of_the_chosen_share() -> None:
    before = pixels(400)
    after = random_erase(before, 0.5, seeded())
    changed = (after != before).any(dim=3)
    touched = changed.any(dim=(1, 2))
    assert 140 < int(touched.sum()) < 260
    for mask in changed[touched]:
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        height, width = (int(each.max() - each.min()) + 1 for each in (rows, columns))
        assert height * width <= 0.25 * 80 * 1.6  # rounding of both sides


def test_augmentation_follows_the_recipe_and_repeats_with_the_same_seed() -> None:
    before = pixels()
    assert augment(before, choose_recipe("cnn"), seeded()) is before
    resnet = choose_recipe("resnet")
    first, second = (augment(before, resnet, seeded(4)) for _ in range(2))
    assert first.shape == before.shape
    assert first.dtype == torch.uint8
    assert (first == second).all()
    assert (first != augment(before, resnet, seeded(5))).any()
