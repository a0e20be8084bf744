"""A reward in fifteen lines: how colourful the frames are (Hasler and Suesstrunk, 2003)."""


class Colourfulness:
    """Colourfulness of every frame, averaged over the video."""

    frames = "all"  # it looks at every frame; "first" would decode one only

    def __init__(self, weight_of_mean=0.3):
        self.weight_of_mean = weight_of_mean

    def __call__(self, video, prompts, **info):  # (B, 3, T, H, W) float32 in [0, 1]
        """Return (B,) scores."""
        red, green, blue = video.unbind(1)
        opponents = red - green, (red + green) / 2 - blue
        variance = sum(x.var(dim=(2, 3)) for x in opponents)
        squared_mean = sum(x.mean(dim=(2, 3)) ** 2 for x in opponents)
        spread, distance = (variance + 1e-6).sqrt(), (squared_mean + 1e-6).sqrt()  # a grey frame has a gradient too
        return (spread + self.weight_of_mean * distance).mean(1)  # (B,): 0 is grey, 0.43 extremely colourful
