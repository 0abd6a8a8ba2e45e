"""Draw contact sheets, animations as GIF and HTML, and loss curves. Files are written atomically.

Images are arrays (..., height, width, channel) with 1 (grey) or 3 (RGB) channels: floating point,
nominally in [-1, 1], or uint8 in 0..255. A picture is one uint8 RGB array (height, width, 3).
All functions raise InputError naming the invalid argument. Matplotlib is slow to import, so it is
imported only where it draws.
"""

from diffusion_jax.pictures.animations import animation_html, gif_bytes, save_gif, save_html
from diffusion_jax.pictures.curves import loss_curve
from diffusion_jax.pictures.sheets import SCALINGS, Rows, grid, png_bytes, save_png, to_uint8
