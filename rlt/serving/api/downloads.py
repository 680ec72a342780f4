"""Files that a link gives to whoever has it, for a while: clients fetch them without their key."""

import hashlib
import hmac
import tarfile
import time
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from rlt.serving.api.asking import Serving
from rlt.serving.errors import Missing
from rlt.serving.service import Service

router = APIRouter()
ARCHIVE = "archive.tar"
BYTES = "application/octet-stream"


def _signature(service: Service, folder: str, name: str, expires: int) -> str:
    return hmac.new(service.secret, f"{folder}\n{name}\n{expires}".encode(), hashlib.sha256).hexdigest()


def link(request: Request, service: Service, address: str, name: str, expires: float) -> str:
    folder = address.rpartition("/")[2]
    signature = _signature(service, folder, name, int(expires))
    path = f"api/v1/downloads/{int(expires)}/{signature}/{folder}/{name}"
    return f"{str(request.base_url).rstrip('/')}/{path}"


@router.get("/downloads/{expires}/{signature}/{folder}/{name}")
def download(expires: int, signature: str, folder: str, name: str, service: Serving) -> Response:
    right = hmac.compare_digest(_signature(service, folder, name, expires).encode(), signature.encode())
    if not right or expires < time.time():
        raise Missing("the link is not known, or its time is over")
    address = f"{service.storage.root.rstrip('/')}/{folder}"
    if name == ARCHIVE:
        sizes = {each: service.storage.size(address, each) for each in service.storage.files(address)}
        return StreamingResponse(_archive(service, address, sizes), media_type=BYTES)
    size = service.storage.size(address, name)
    headers = {"Content-Length": str(size)}
    return StreamingResponse(service.storage.read(address, name, size), headers=headers, media_type=BYTES)


def _archive(service: Service, address: str, sizes: dict[str, int]) -> Iterator[bytes]:
    for name, size in sizes.items():
        member = tarfile.TarInfo(name)
        member.size = size
        yield member.tobuf()
        yield from service.storage.read(address, name, size)
        yield bytes(-size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
