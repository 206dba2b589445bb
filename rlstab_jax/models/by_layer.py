"""Variables of a model layer by layer. At rest they are stacked over layers, which the scan of `Transformer` takes as
they are; what goes through the layers one by one, as decoding does at each token, takes them apart.

Taking them apart copies them. An inference engine does it once, with its weights' cast (`inference.prepare`): compilers
would do it at each call of a decoding program, and keep both.
"""

import jax

# The collection of variables in which those of each layer lie apart, by its depth: {"0": {"params": ...}, ...}.
LAYERS = "layers"


def by_layer(variables: dict) -> dict:
    """Variables with those of the layers in the collection `LAYERS` instead of stacked; as they are if they lie so."""
    if LAYERS in variables:
        return variables
    apart: dict[tuple[int, int, int], dict] = {}
    rest: dict[str, dict] = {}
    for collection, tree in variables.items():
        rest[collection] = {name: leaf for name, leaf in tree.items() if not name.startswith("segment_")}
        for segment in tree.keys() - rest[collection].keys():
            for block, stacked in tree[segment].items():
                for i in range(jax.tree.leaves(stacked)[0].shape[0]):
                    place = int(segment.removeprefix("segment_")), i, int(block.removeprefix("block_"))
                    apart.setdefault(place, {})[collection] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return rest | {LAYERS: {str(depth): apart[place] for depth, place in enumerate(sorted(apart))}}


def layers_of(variables: dict) -> list[dict]:
    """The variables of each layer that has some, in depth order."""
    layers = by_layer(variables)[LAYERS]
    return [layers[str(depth)] for depth in range(len(layers))]
