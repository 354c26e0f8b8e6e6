"""JPEG and WebP keep the recipe (settings) of a picture in an XMP packet, as a property of our own."""

import html
import json
import re

KEY = "nanoip2p"  # name of the text chunk of a PNG
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # formats that we write
LONGEST_PACKET = 2**20  # bytes of XMP that we read; a JPEG holds 64 KB
HEADER = b"http://ns.adobe.com/xap/1.0/\0"  # begins the APP1 segment of a JPEG that holds XMP
PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:nanoip2p="urn:nanoip2p:" nanoip2p:recipe="{}"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


def to_xmp(recipe: dict) -> bytes:
    """An XMP packet with the recipe as JSON."""
    return PACKET.format(html.escape(json.dumps(recipe))).encode()


def from_xmp(packet: bytes) -> str:
    """The JSON text in a packet, even if another program rewrote the packet. ValueError if there is none."""
    rest = packet[:LONGEST_PACKET].partition(b"nanoip2p:recipe")[2]  # XML parsers would expand entities
    found = re.match(rb"""\s*(?:=\s*"([^"]*)"|=\s*'([^']*)'|>([^<]*)<)""", rest)
    if not found:
        raise ValueError("no recipe")
    return html.unescape(found[found.lastindex].decode())
