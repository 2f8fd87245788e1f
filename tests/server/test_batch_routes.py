"""Routes of files and batches over the fake model, in one process."""

import errno
import json
import os

import pytest

fastapi = pytest.importorskip("fastapi")
from starlette.testclient import TestClient  # noqa: E402

from batchinfer.batches import catalog as catalog_module  # noqa: E402
from batchinfer.server import batch_routes as batches_module  # noqa: E402
from batchinfer.server import upload as upload_module  # noqa: E402
from tests.server.batch_app import make_app  # noqa: E402
from tests.server.batch_lines import CHAT, content, gone, line, parsed, rows, wait_for  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx`:DeprecationWarning")


@pytest.fixture
def client(tmp_path):
    with TestClient(make_app(tmp_path / "data", max_file_bytes=1 << 20)) as client:
        yield client


def upload(client, data, purpose="batch", name="in.jsonl"):
    return client.post("/v1/files", data={"purpose": purpose}, files={"file": (name, data)})


def create(client, data, **values):
    file_id = upload(client, data).json()["id"]
    return client.post("/v1/batches", json={"input_file_id": file_id, "endpoint": CHAT, **values})


def ended(client, batch_id, accepted=("completed", "failed", "cancelled", "expired")):
    return wait_for(lambda: client.get(f"/v1/batches/{batch_id}").json(), accepted)


def result(client, file_id):
    return parsed(client.get(f"/v1/files/{file_id}/content").content)


def problem_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_uploaded_file_is_returned_byte_for_byte(client):
    data = rows(3)
    made = upload(client, data, name="../../täglich.jsonl").json()
    assert made["object"] == "file" and made["bytes"] == len(data) and made["purpose"] == "batch"
    assert made["filename"] == "../../täglich.jsonl" and made["status"] == "processed"
    assert client.get(f"/v1/files/{made['id']}").json() == made
    assert client.get(f"/v1/files/{made['id']}/content").content == data
    assert client.get("/v1/files").json()["data"] == [made]
    assert client.delete(f"/v1/files/{made['id']}").json() == {"id": made["id"], "object": "file", "deleted": True}
    assert problem_of(client.get(f"/v1/files/{made['id']}"), 404)["code"] == "not_found"
    assert problem_of(client.delete(f"/v1/files/{made['id']}"), 404)["code"] == "not_found"
    root = client.app.state.catalog.root
    assert not list((root / "files").iterdir()) and not list((root / ".tmp").iterdir())


def test_files_are_listed_a_page_at_a_time(client):
    made = [upload(client, rows(1)).json()["id"] for _ in range(5)]
    first = client.get("/v1/files", params={"limit": 2}).json()
    assert [file["id"] for file in first["data"]] == made[:2:-1] and first["has_more"]
    rest = client.get("/v1/files", params={"limit": 3, "after": first["last_id"]}).json()
    assert [file["id"] for file in rest["data"]] == made[2::-1] and not rest["has_more"]
    oldest = client.get("/v1/files", params={"order": "asc", "limit": 1}).json()
    assert oldest["first_id"] == made[0]
    assert client.get("/v1/files", params={"purpose": "batch_output"}).json()["data"] == []
    assert problem_of(client.get("/v1/files", params={"after": "file-x"}), 400)["param"] == "after"
    assert problem_of(client.get("/v1/files", params={"limit": 0}), 400)["param"] == "limit"


def test_a_batch_answers_every_row_in_input_order(client):
    data = content(line(n, body={"n": 1 + n % 2}) for n in range(40))
    made = create(client, data, completion_window="24h", metadata={"job": "nightly"}).json()
    assert (made["object"], made["status"], made["errors"]) == ("batch", "validating", None)
    assert made["expires_at"] - made["created_at"] in (86399, 86400)
    batch = ended(client, made["id"])
    assert batch["status"] == "completed" and batch["metadata"] == {"job": "nightly"}
    assert batch["created_at"] <= batch["in_progress_at"] <= batch["finalizing_at"] <= batch["completed_at"]
    good = result(client, batch["output_file_id"])
    assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0} and batch["error_file_id"] is None
    assert [row["custom_id"] for row in good] == [f"row-{n}" for n in range(40)]
    assert all(len(row["response"]["body"]["choices"]) == 1 + n % 2 for n, row in enumerate(good))
    assert {row["response"]["body"]["model"] for row in good} == {"fake"}
    file = client.get(f"/v1/files/{batch['output_file_id']}").json()
    assert file["purpose"] == "batch_output" and file["filename"] == f"{batch['id']}_output.jsonl"
    assert gone(client.app.state.catalog.work(batch["id"]))


def test_wrong_body_fails_its_own_row_only(client):
    wrong = [
        line(1, body={"temperature": -1}),
        line(2, body={"messages": []}),
        line(3, body={"messages": [{"role": "user", "content": "x" * 9000}]}),
    ]
    batch = ended(client, create(client, content([line(0), *wrong])).json()["id"])
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    assert [row["custom_id"] for row in result(client, batch["output_file_id"])] == ["row-0"]
    errors = result(client, batch["error_file_id"])
    assert [row["custom_id"] for row in errors] == ["row-1", "row-2", "row-3"]
    assert all(row["error"] is None and row["response"]["status_code"] == 400 for row in errors)
    bodies = [row["response"]["body"]["error"] for row in errors]
    assert [body["code"] for body in bodies] == ["bad_parameters", "invalid_input", "context_length_exceeded"]
    assert {body["type"] for body in bodies} == {"invalid_request_error"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", [("empty_file", None, None)]),
        (b"\n \n", [("empty_file", None, None)]),
        (b'{"custom_id": \n[1]\n' + rows(1), [("invalid_json_line", 1, None), ("invalid_json_line", 2, None)]),
        (rows(2) + rows(1), [("duplicate_custom_id", 3, "custom_id")]),
        (content([line(0, url="/v1/completions")]), [("invalid_url", 1, "url")]),
        (content([line(0, url=None, method="GET")]), [("invalid_method", 1, "method"), *[("missing", 1, "url")]]),
        (content([line(0), line(1, body={"model": "gpt-4"})]), [("model_not_found", 2, "body.model")]),
        (content([line(0, body={"model": None})]), [("missing", 1, "body.model")]),
        (content([line(0, custom_id=7)]), [("invalid_type", 1, "custom_id")]),
        (content([line(0, custom_id=None)]), [("missing", 1, "custom_id")]),
        (content([{"custom_id": "a", "method": "POST", "url": CHAT}]), [("missing", 1, "body")]),
        ("rows".encode("utf-16"), [("invalid_file", None, None)]),
    ],
)
def test_a_file_that_is_no_batch_fails_with_its_lines(client, data, expected):
    batch = ended(client, create(client, data).json()["id"])
    assert batch["status"] == "failed" and batch["failed_at"] and batch["output_file_id"] is None
    assert batch["errors"]["object"] == "list"
    found = [(each["code"], each["line"], each["param"]) for each in batch["errors"]["data"]]
    assert found == [("missing_required_parameter" if c == "missing" else c, n, p) for c, n, p in expected]
    assert all(each["message"] for each in batch["errors"]["data"])
    assert not list((client.app.state.catalog.root / ".tmp").iterdir())


def test_many_faults_are_listed_up_to_a_hundred(client):
    batch = ended(client, create(client, rows(500, method="PUT")).json()["id"])
    assert [each["line"] for each in batch["errors"]["data"]] == list(range(1, 101))


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
    ],
)
def test_wrong_batch_body_is_refused_with_its_field(client, values, param):
    assert problem_of(create(client, rows(1), **values), 400)["param"] == param
    assert client.get("/v1/batches").json()["data"] == []


def test_body_that_is_no_json_is_a_400(client):
    problem_of(client.post("/v1/batches", content=b"{"), 400)
    problem_of(client.post("/v1/batches", content=b"[]", headers={"content-type": "text/plain"}), 400)


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "file-..", "batch_%00", "a" * 5000])
def test_an_id_is_never_a_path(client, name):
    for path in ("/v1/files/{}", "/v1/files/{}/content", "/v1/batches/{}"):
        assert client.get(path.format(name)).status_code == 404
    assert client.delete(f"/v1/files/{name}").status_code == 404
    assert client.post(f"/v1/batches/{name}/cancel").status_code == 404


def test_a_result_is_no_input(client):
    batch = ended(client, create(client, rows(1)).json()["id"])
    asked = {"input_file_id": batch["output_file_id"], "endpoint": CHAT}
    assert problem_of(client.post("/v1/batches", json=asked), 400)["param"] == "input_file_id"


def test_malformed_upload_is_a_400(client):
    assert problem_of(client.post("/v1/files", json={"purpose": "batch"}), 400)
    assert problem_of(client.post("/v1/files", data={"purpose": "batch"}, files={"other": ("a", b"1")}), 400)["param"]
    assert problem_of(upload(client, b"1", purpose="assistants"), 400)["param"] == "purpose"
    twice = [("file", ("a", b"1")), ("file", ("b", b"2"))]
    assert problem_of(client.post("/v1/files", data={"purpose": "batch"}, files=twice), 400)["param"] == "file"
    long = {"purpose": "batch", "note": "x" * 70_000}
    assert problem_of(client.post("/v1/files", data=long, files={"file": ("a", b"1")}), 400)["param"] == "note"
    kind = {"content-type": "multipart/form-data; boundary=b"}
    cut = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nabc'
    assert "ends early" in problem_of(client.post("/v1/files", content=cut, headers=kind), 400)["message"]
    assert "malformed" in problem_of(client.post("/v1/files", content=b"nothing", headers=kind), 400)["message"]
    assert not list((client.app.state.catalog.root / ".tmp").iterdir())
    assert client.get("/v1/files").json()["data"] == []


def test_an_upload_above_the_limit_is_refused(client):
    assert upload(client, b"x" * (1 << 20)).status_code == 200
    assert problem_of(upload(client, b"x" * ((1 << 20) + 1)), 413)["code"] == "file_too_large"

    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(100):
            yield b"y" * 65536

    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert problem_of(client.post("/v1/files", content=endless(), headers=kind), 413)["code"] == "file_too_large"
    assert not list((client.app.state.catalog.root / ".tmp").iterdir())


def test_full_disk_is_a_507(client, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(upload_module, "_write_pending", full)
        assert problem_of(upload(client, rows(1)), 507)["code"] == "disk_full"
    with monkeypatch.context() as patch:
        patch.setattr(catalog_module.os, "fsync", full)
        assert problem_of(upload(client, rows(1)), 507)["code"] == "disk_full"
    file_id = upload(client, rows(1)).json()["id"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        response = client.post("/v1/batches", json={"input_file_id": file_id, "endpoint": CHAT})
        assert problem_of(response, 507)["type"] == "server_error"
    assert client.get("/v1/batches").json()["data"] == []
    assert client.post("/v1/batches", json={"input_file_id": file_id, "endpoint": CHAT}).status_code == 200


def test_batches_are_listed_newest_first(client):
    made = [create(client, rows(1)).json()["id"] for _ in range(3)]
    for batch_id in made:
        ended(client, batch_id)
    first = client.get("/v1/batches", params={"limit": 2}).json()
    assert [batch["id"] for batch in first["data"]] == made[:0:-1] and first["has_more"]
    rest = client.get("/v1/batches", params={"after": first["last_id"]}).json()
    assert [batch["id"] for batch in rest["data"]] == made[:1] and not rest["has_more"]


def test_an_input_file_in_use_stays(client):
    batch = create(client, rows(200)).json()
    response = client.delete(f"/v1/files/{batch['input_file_id']}")
    if response.status_code != 200:  # else the batch was faster
        assert problem_of(response, 400)["code"] == "file_in_use"
    ended(client, batch["id"])
    assert client.delete(f"/v1/files/{batch['input_file_id']}").status_code == (
        200 if response.status_code != 200 else 404
    )


def test_an_ended_batch_cannot_be_cancelled(client):
    batch = ended(client, create(client, rows(1)).json()["id"])
    assert problem_of(client.post(f"/v1/batches/{batch['id']}/cancel"), 400)["code"] == "batch_not_cancellable"


def test_batch_of_completions_with_a_byte_order_mark_runs(client):
    lines = [line(n, url="/v1/completions", body={"messages": None, "prompt": f"P{n}"}) for n in range(3)]
    batch = ended(client, create(client, b"\xef\xbb\xbf" + content(lines), endpoint="/v1/completions").json()["id"])
    assert batch["status"] == "completed", batch
    assert [row["response"]["body"]["object"] for row in result(client, batch["output_file_id"])] == [
        "text_completion"
    ] * 3


def test_openapi_schema_documents_the_batch_routes(client):
    described = client.get("/openapi.json").json()["paths"]
    assert "multipart/form-data" in described["/v1/files"]["post"]["requestBody"]["content"]
    assert {"400", "404", "507"} <= set(described["/v1/batches"]["post"]["responses"])


def test_file_and_batch_objects_have_all_of_openais_fields():
    openai = pytest.importorskip("openai")
    record = catalog_module.BatchRecord("batch_1", CHAT, "file-1", "24h", 2, None, times={"validating": 1})
    problem = catalog_module.Problem("invalid_url", "no", 3, "url")
    batch = openai.types.Batch.model_validate(
        batches_module.batch_object(record) | {"errors": {"object": "list", "data": [problem._asdict()]}}
    )
    assert batch.errors.data[0].line == 3 and batch.request_counts.total == 0
    file = openai.types.FileObject.model_validate(
        batches_module.file_object(catalog_module.FileRecord("file-1", "a", "batch", 1, 1))
    )
    assert json.loads(file.model_dump_json())["bytes"] == 1
