"""A page in the browser for editing pictures, made with gradio (pip install 'nanoip2p[app]')."""
