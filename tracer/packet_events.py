"""What a kept packet of a capture is: the ``event`` of table ``packets``, and the names of its probes."""

SYN = "SYN"
SYN_AGAIN = "SYN retransmitted"
SYN_ACK = "SYN-ACK"
SYN_ACK_AGAIN = "SYN-ACK retransmitted"
THIRD_ACK = "third ACK"
THIRD_ACK_AGAIN = "third ACK repeated"
RST_FROM_SERVER = "RST from server"
RST_FROM_CLIENT = "RST from client"
AGAIN_FROM_CLIENT = "data or FIN retransmitted by client"
AGAIN_FROM_SERVER = "data or FIN retransmitted by server"

EVENTS = (
    SYN,
    SYN_AGAIN,
    SYN_ACK,
    SYN_ACK_AGAIN,
    THIRD_ACK,
    THIRD_ACK_AGAIN,
    RST_FROM_SERVER,
    RST_FROM_CLIENT,
    AGAIN_FROM_CLIENT,
    AGAIN_FROM_SERVER,
)
