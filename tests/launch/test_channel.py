"""Messages and descriptors between supervisor and keepers; an end that is gone."""

import os
import socket

from launch.channel import Channel, connect, listen, remove_directory_of


def pair() -> tuple[Channel, Channel]:
    first, second = socket.socketpair()
    return Channel(first), Channel(second)


def test_messages_arrive_in_order_and_whole():
    sender, receiver = pair()
    for number in range(100):
        sender.send({"number": number, "text": "zwölf\n"})
    received = []
    while len(received) < 100:
        received += receiver.receive()
    assert [message["number"] for message in received] == list(range(100))
    assert received[0]["text"] == "zwölf\n"
    assert receiver.receive() == []
    assert not receiver.closed


def test_a_message_cut_in_two_is_kept_until_it_is_whole():
    first, second = socket.socketpair()
    receiver = Channel(second)
    first.sendall(b'{"a": 1}\n{"b"')
    assert receiver.receive() == [{"a": 1}]
    first.sendall(b": 2}\n")
    assert receiver.receive() == [{"b": 2}]


def test_descriptors_travel_along(tmp_path):
    sender, receiver = pair()
    with (tmp_path / "file").open("wb") as file:
        sender.send({"start": True}, descriptors=[file.fileno()])
    assert receiver.receive() == [{"start": True}]
    (descriptor,) = receiver.descriptors
    os.write(descriptor, b"from the other end")
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"from the other end"


def test_an_end_that_is_gone_is_noticed_and_harmless():
    sender, receiver = pair()
    sender.send({"last": "word"})
    sender.close()
    assert receiver.receive() == [{"last": "word"}]
    assert receiver.receive() == []
    assert receiver.closed
    receiver.send({"to": "nobody"})


def test_listen_connect_and_clean_up(tmp_path):
    path = str(tmp_path / "d" / "socket")
    os.mkdir(os.path.dirname(path))
    with listen(path) as server:
        client = connect(path)
        connection, _ = server.accept()
        client.send({"hello": 1})
        assert Channel(connection).receive() == [{"hello": 1}]
    remove_directory_of(path)
    remove_directory_of(path)
    assert list(tmp_path.iterdir()) == []
