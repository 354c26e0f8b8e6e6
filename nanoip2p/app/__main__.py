"""Edit pictures on a page in the browser.

    python -m nanoip2p.app
    python -m nanoip2p.app --weights instruct-pix2pix-00-22000.safetensors
"""

import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

from nanoip2p.common import cli
from nanoip2p.common.files import find_weights

MOST_BYTES = 50 * 2**20  # of an upload; its pixels are limited by images.MAX_MEGAPIXELS
# The browser loads nothing from other servers, and sends nothing to them
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; img-src 'self' data: blob:; "
          "style-src 'self' 'unsafe-inline'; font-src 'self' data:; media-src 'self' blob:; worker-src blob:")


def make_parser():
    """The parser of the command."""
    parser = cli.make_parser(prog="python -m nanoip2p.app", description=__doc__)
    parser.add_argument("--weights", default="weights/nano-ip2p", help="a folder, a file or a Hub name")
    cli.add_flags(parser)
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first that works")
    parser.add_argument("--dtype", choices=cli.DTYPES, default="fp32", help="fp16, bf16: faster on a GPU")
    parser.add_argument("--fast", action=cli.SWITCH, help="faster on a CPU; default: for full-size weights")
    parser.add_argument("--low-memory", action="store_true", help="needs less memory, but more time")
    parser.add_argument("--port", type=cli.between(0, 65535, int), default=7860, help="port; 0: any free one")
    parser.add_argument("--listen", action="store_true",
                        help="let other machines use the page; default: only this machine can use it")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for this name and password")
    parser.add_argument("--no-browser", action="store_true", help="only print the address of the page")
    return parser


def guarded(app):
    """ASGI middleware: sends POLICY with every answer, and keeps gradio from fetching other addresses."""
    async def guard(scope, receive, send):
        if scope["type"] == "http" and "=http" in scope["path"]:  # gradio would fetch this address itself
            scope = scope | {"path": "/none", "raw_path": b"/none"}

        async def answer(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)
        await app(scope, receive, answer)
    return guard


def serve(args, folder: Path) -> None:
    """Load the editor, and serve its page until Ctrl-C. Gradio keeps uploads and results in `folder`."""
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    cli.import_torch()
    try:
        import gradio as gr
    except ImportError:
        gr = None
    if not gr or not gr.__version__.startswith("6."):
        raise ValueError("the page needs gradio 6: pip install 'nanoip2p[app]'")
    from starlette.middleware import Middleware

    from nanoip2p import Editor
    from nanoip2p.app.page import CSS, Page
    from nanoip2p.checkpoint import load, tensors
    from nanoip2p.speed.fast import speed_up
    checkpoint = load.open_checkpoint(find_weights(args.weights), args.vae, args.tokenizer, args.raw_weights)
    cli.say(f"opened {args.weights}: {checkpoint.description}")
    editor = Editor.load(checkpoint, args.device, tensors.DTYPES[args.dtype], args.low_memory)
    if editor.device.type == "cpu" and not args.low_memory:  # on CUDA, each picture size would compile anew
        speed_up(editor, args.fast, cli.say)
    page = Page(editor, args.weights, folder, args.low_memory)
    page.blocks.queue(max_size=32).launch(
        server_name="0.0.0.0" if args.listen else "127.0.0.1", server_port=args.port or None,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None, max_file_size=MOST_BYTES,
        inbrowser=not (args.listen or args.no_browser), prevent_thread_lock=True, quiet=True, show_error=True,
        share=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False,
        footer_links=[], theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS, app_kwargs={"middleware": [Middleware(guarded)]})
    print(f"open {page.blocks.local_url} in a browser; Ctrl-C ends the page", flush=True)
    if args.listen:
        print(f"every machine that reaches this one can use the page, at port {page.blocks.server_port}" +
              (", with the name and password" if args.auth else "; --auth asks for a name and a password"),
              flush=True)
    try:
        threading.Event().wait()
    finally:
        page.stop_last.set()
        page.blocks.close(verbose=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    def work() -> None:
        args = make_parser().parse_args(argv)
        if args.auth is not None and not all(args.auth.partition(":")):
            raise ValueError("--auth needs a name and a password: USER:PASSWORD")
        try:
            socket.create_server(("", args.port)).close()
        except OSError as error:
            raise ValueError(f"--port {args.port}: {os.strerror(error.errno)}; give another, or 0") from None
        with tempfile.TemporaryDirectory(prefix="nanoip2p-") as folder:
            serve(args, Path(folder))
    return cli.run(work, "the page is closed", "try --low-memory or --dtype fp16")


if __name__ == "__main__":
    sys.exit(main())
