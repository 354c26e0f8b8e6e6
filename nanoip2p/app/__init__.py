"""A page in the browser on which to edit, made with gradio (pip install 'nanoip2p[app]')."""
