"""How far a picture is from all pictures that the drawing program can draw: it grows when pictures break.

The distance in the detector's last layer, every feature divided by its deviation over renders, to the nearest of
`COUNT` renders that went through the VAE; in units of the median such distance of other renders, so that 1 is a
render's own. It asks for no concept: a good picture without any has about 1, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cmlora.sprites import draw
from cmlora.sprites.detector import Detector, embeddings
from cmlora.sprites.measure import through_vae

COUNT = 1500


class Realism:
    """Renders to measure against.

    Args:
        vae: the pipeline's, on the CPU.
        detector: whose last layer is looked at.
    """

    def __init__(self, vae: Any, detector: Detector) -> None:
        self.detector = detector
        scenes = draw.sample(COUNT + 300, seed=301, concepts=0.5)
        found = embeddings(detector, through_vae(vae, draw.render(scenes)))
        self.scale = found[:COUNT].std(0) + 1e-6
        self.known = found[:COUNT] / self.scale
        self.unit = float(np.median(self._nearest(found[COUNT:] / self.scale)))

    def distance(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """[n] of pictures, uint8 [n, 64, 64, 3]."""
        return self._nearest(embeddings(self.detector, pictures) / self.scale) / self.unit

    def _nearest(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        squares = (x**2).sum(1)[:, None] + (self.known**2).sum(1)[None] - 2 * x @ self.known.T
        return np.asarray(np.sqrt(np.maximum(squares, 0).min(1)))
