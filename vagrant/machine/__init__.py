"""The test machine under plain qemu: a Debian 12 image built once, a kernel booted per command.

``vagrant/vm build`` makes the image, ``vagrant/vm run -- COMMAND`` boots it. This package runs before
anything of the project is installed, so it imports nothing but the standard library and click.

    inputs.py   what the image is made of, and the digest that says whether it is current
    image.py    root tree -> provisioning -> one ext4 file, and a kernel with its initrd per version
    initrd.py   the 2 MB initrd, written without cpio
    cargo.py    the tars: project and command in, exit code and files out
    qemu.py     argument list; whether KVM really works
    boot.py     one run: start, stream, time-outs, kill
    cli.py      the command line
    guest/      what runs inside: the initrd's init, the machine's init, and how the tree is made
"""
