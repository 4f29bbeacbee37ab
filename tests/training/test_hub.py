"""Uploads, through the hub library itself, to a server that answers as the hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sf_mllm.errors import InputError
from sf_mllm.training.hub import check_repository_name, push_to_hub


class Hub(BaseHTTPRequestHandler):
    """The few answers that making a repository and committing small files need."""

    requests: list[tuple[str, dict | list]]
    refuse = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in body.splitlines()]
        self.requests.append((self.path, lines))
        address = f"http://{self.headers['Host']}/someone/small"
        if self.refuse:
            self.answer({"error": "Invalid credentials"}, status=401)
        elif self.path == "/api/repos/create":
            self.answer({"url": address, "id": "someone/small", "name": "someone/small"})
        elif self.path.startswith("/api/models/someone/small/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
            self.answer({"files": files})
        else:
            self.answer({"commitUrl": f"{address}/commit/abc", "commitOid": "abc", "success": True})

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "requests", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "sf_llava"}')
    (folder / "modeling_sf_llava.py").write_text("CODE = 1\n")
    return folder


def test_every_file_is_sent_in_one_commit_to_a_private_repository(hub, directory):
    address = push_to_hub(directory, "someone/small")
    assert address.endswith("/someone/small")
    (create,) = [lines[0] for path, lines in hub.requests if path == "/api/repos/create"]
    assert (create["organization"], create["name"]) == ("someone", "small")
    assert create.get("private") is True or create.get("visibility") == "private"  # older hub libraries, newer ones
    (commit,) = [lines for path, lines in hub.requests if path.startswith("/api/models/someone/small/commit/main")]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit if line["key"] == "file"
    }
    assert sent == {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_refusal_is_one_sentence_that_says_how_to_go_on(hub, directory, monkeypatch):
    monkeypatch.setattr(Hub, "refuse", True)
    with pytest.raises(InputError) as caught:
        push_to_hub(directory, "someone/small")
    message = str(caught.value)
    assert message.startswith(
        f"'{directory}' is complete, but it cannot be uploaded to hub repository 'someone/small': "
    )
    assert "401" in message and f"hf upload someone/small {directory}" in message and "\n" not in message


@pytest.mark.parametrize("name", ["small", "some/one/small", "some one/small", "", "a/b--c"])
def test_names_that_no_repository_can_have_are_refused(name):
    with pytest.raises(InputError, match="Hub repository"):
        check_repository_name(name)


def test_a_good_name_passes():
    check_repository_name("some-one/small_1.0")
