import json

import numpy as np
import pytest

from keras_prune.similarity import mask_similarity, structure_report, weight_stability

A, B = np.array([1, 1, 0, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0, 0, 0])
RNG = np.random.default_rng(0)


def drawn(shape, kept, rng=RNG):
    mask = np.zeros(int(np.prod(shape)), bool)
    mask[rng.choice(mask.size, kept, replace=False)] = True
    return mask.reshape(shape)


def test_numbers_worked_out_by_hand():
    """|A and B| = 2; made equally dense, B keeps one more that A does not: |A or B| = 6."""
    b = B.copy()
    b[2] = 1
    found = mask_similarity(A, b)
    assert (found.kept, found.distance, found.hamming) == pytest.approx((2 / 6, 4 / 6, 4 / 8))
    assert found.pruned == pytest.approx(2 / 6) and found.density == 0.5 and found.layers == {}
    assert found.chance == pytest.approx(0.5 / 1.5)


def test_the_vectors_of_the_check_differ_by_six_tenths_but_are_not_equally_dense(monkeypatch):
    with pytest.raises(ValueError, match="keep 50.00% and 37.50% of 8 entries.*equal density"):
        mask_similarity(A, B)
    monkeypatch.setattr("keras_prune.similarity.SAME_DENSITY", 0.2)
    found = mask_similarity(A, B)
    assert (found.distance, 1 - found.pruned, found.hamming) == pytest.approx((0.6, 0.5, 0.375))


def test_a_mask_is_like_itself_and_the_order_of_two_does_not_matter():
    masks = {"a": drawn((3, 3, 4, 8), 60), "b": drawn((10, 6), 20)}
    others = {"a": drawn((3, 3, 4, 8), 60), "b": drawn((10, 6), 20)}
    itself = mask_similarity(masks, masks)
    assert (itself.kept, itself.distance, itself.pruned, itself.hamming) == (1, 0, 1, 0)
    assert all(layer.kept == 1 for layer in itself.layers.values())
    one, two = mask_similarity(masks, others), mask_similarity(others, masks)
    assert one == two and 0 < one.kept < 1 and set(one.layers) == {"a", "b"}
    assert one.layers["b"] == mask_similarity(masks["b"], others["b"])
    assert json.loads(one.to_json())["layers"]["a"]["kept"] == one.layers["a"].kept
    assert "by chance" in str(one) and str(one).count("\n") == 3


@pytest.mark.parametrize("p, expected", [(0.2, 0.1111), (0.5, 0.3333), (0.8, 0.6667)])
def test_chance_is_what_independent_masks_show(p, expected):
    found = [mask_similarity(drawn((50, 100), int(5000 * p)), drawn((50, 100), int(5000 * p))) for _ in range(60)]
    kept = np.array([f.kept for f in found])
    assert found[0].chance == pytest.approx(p / (2 - p)) == pytest.approx(expected, abs=1e-4)
    assert abs(kept.mean() - found[0].chance) < 5 * kept.std() / np.sqrt(60)
    assert abs(kept.mean() - p) > 20 * kept.std() / np.sqrt(60)  # the control: p itself is far off


def test_chance_knows_the_densities_of_the_layers():
    """Masks of a global budget agree by their layers' densities alone; the density of the whole does not say it."""
    sizes = {"thin": 400, "thick": 3600}

    def masks():
        return {name: drawn((40, 100), kept) for name, kept in sizes.items()}

    found = [mask_similarity(masks(), masks()) for _ in range(60)]
    kept = np.array([f.kept for f in found])
    assert abs(kept.mean() - found[0].chance) < 5 * kept.std() / np.sqrt(60)
    assert kept.mean() > 0.5 / 1.5 + 0.2  # what p / (2 - p) of the whole would say


def test_masks_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="other layers: y"):
        mask_similarity({"x": A}, {"x": A, "y": A})
    with pytest.raises(ValueError, match=r"shapes \(8,\) and \(2, 4\)"):
        mask_similarity(A, A.reshape(2, 4))
    with pytest.raises(ValueError, match="keeps nothing"):
        mask_similarity(A * 0, A * 0)


def test_structure_is_counted_and_chance_is_what_random_masks_show():
    mask = drawn((3, 3, 4, 8), 150)
    mask[..., [1, 5]] = False
    mask[:, :, 2, :] = False
    found = structure_report({"conv": mask}).layers["conv"]
    assert (found.outputs, found.inputs, found.zero_outputs, found.zero_inputs) == (8, 4, 2, 1)
    assert found.density == mask.mean()
    for kept in (20, 40):
        reports = [structure_report({"c": drawn((3, 3, 4, 8), kept)}).layers["c"] for _ in range(400)]
        for axis in ("outputs", "inputs"):
            zero = np.array([getattr(r, f"zero_{axis}") for r in reports])
            wanted = getattr(reports[0], f"chance_{axis}")
            assert abs(zero.mean() - wanted) < 5 * zero.std() / 20 + 1e-3
    assert reports[0].chance_outputs > 1e-4  # not nothing against nothing
    full = structure_report({"c": np.ones((5, 6))}).layers["c"]
    assert full.chance_outputs == full.zero_outputs == 0 and full.density == 1
    assert "2 of 8" in str(structure_report({"conv": mask}))
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        structure_report({"bias": A})


def test_stability_of_weights_that_stayed_turned_and_grew():
    was = RNG.normal(size=(20, 30))
    kept = drawn((20, 30), 200)
    same = weight_stability({"w": was}, {"w": 2 * was * kept})
    assert same["w"] == same["all"] and (same["w"].cosine, same["w"].same_sign) == pytest.approx((1, 1))
    assert same["w"].growth == pytest.approx(2)
    turned = weight_stability({"w": was}, {"w": -was * kept})["w"]
    assert (turned.cosine, turned.same_sign, turned.growth) == pytest.approx((-1, 0, 1))
    others = weight_stability({"w": was}, {"w": RNG.normal(size=(20, 30)) * kept})["w"]
    assert abs(others.cosine) < 0.3 and 0.35 < others.same_sign < 0.65  # chance
    # What was pruned does not count, whatever it was.
    loud = np.where(kept, was, 1e6)
    assert weight_stability({"w": loud}, {"w": 2 * was * kept}) == same
    with pytest.raises(ValueError, match="other shapes"):
        weight_stability({"w": was}, {"w": was[:2]})
