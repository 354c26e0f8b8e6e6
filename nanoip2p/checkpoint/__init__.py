"""Open, save and convert checkpoints of Stable Diffusion 1.x and InstructPix2Pix, in all common layouts.

    load.load_model("instruct-pix2pix-00-22000.ckpt")                  # an Editor
    save.convert(load.open_checkpoint("in.ckpt"), Path("folder"))      # a single file -> a diffusers folder
"""
