"""Files that a link gives to whoever has it, for a while: clients fetch them without their key."""

import hashlib
import hmac
import io
import tarfile
import time

from fastapi import APIRouter, Request, Response

from rlt.serving.api.asking import Serving
from rlt.serving.errors import Missing
from rlt.serving.service import Service

router = APIRouter()
ARCHIVE = "archive.tar"


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
    raw = _archive(service, address) if name == ARCHIVE else service.storage.read(address, name)
    return Response(raw, media_type="application/octet-stream")


def _archive(service: Service, address: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in service.storage.files(address):
            raw = service.storage.read(address, name)
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return buffer.getvalue()
