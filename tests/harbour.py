"""The drawing that most tests show to a model."""

from PIL import Image, ImageDraw


def draw_harbour(width=1024, height=768):
    """A harbour in the evening, always the same: an RGB image."""
    image = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    horizon = round(0.6 * height)
    for y in range(horizon):
        t = y / horizon
        pen.line((0, y, width, y), (round(60 + 190 * t), round(70 + 90 * t), round(140 - 60 * t)))
    sun = (0.63 * width, 0.36 * height, 0.77 * width, 0.54 * height)
    pen.ellipse(sun, (255, 220, 130))
    for y in range(horizon, height):
        t = (y - horizon) / (height - horizon)
        pen.line((0, y, width, y), (round(120 - 90 * t), round(90 - 50 * t), round(120 - 40 * t)))
    hill = [(0.0, 0.6), (0.0, 0.5), (0.15, 0.42), (0.3, 0.52), (0.45, 0.6)]
    hull = [(0.22, 0.78), (0.5, 0.78), (0.45, 0.85), (0.27, 0.85)]
    sail = [(0.35, 0.4), (0.35, 0.76), (0.5, 0.76)]
    for shape, colour in ((hill, (40, 60, 50)), (hull, (70, 40, 30)), (sail, (200, 50, 50))):
        pen.polygon([(u * width, v * height) for u, v in shape], colour)
    return image
