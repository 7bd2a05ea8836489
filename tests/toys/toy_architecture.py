"An architecture of its own, whose blocks the search does not find: one entry of the table."

from crosscoder.data.blocks import BLOCKS

BLOCKS["toy"] = lambda model: model.tower.floors
