# What an installer looks like from outside, in a kernel of 1024 bytes that never leaves real mode (Linux,
# Documentation/arch/x86/boot.rst): it prints `said` on the serial line, and then restarts the machine, or waits for ever.
# SAID: 0 that the system is installed, 1 a question, 2 nothing of either kind. RESTART: 0 or 1.
        .code16
        .globl _start
_start: .ascii "MZ"             # and it looks like a program for UEFI, which says for which CPU it is (PE format)
        .org 0x3c
        .long header
header: .ascii "PE\0\0"
        .word 0x8664
        .org 0x1f1
        .byte 1                 # sectors behind this one that run in real mode
        .org 0x1fe
        .word 0xaa55
        jmp begin
        .org 0x202
        .ascii "HdrS"
        .word 0x0206            # the protocol's version
        .org 0x211
        .byte 1                 # the rest is for 1 MiB; there is none
        .org 0x22c
        .long 0x37ffffff        # where its initramfs may end
        .org 0x280
begin:  cli
        mov $said - _start, %si # the segment begins where the first sector does
next:   mov %ds:(%si), %al
        inc %si
        test %al, %al
        jz done
        mov %al, %ah
        mov $0x3fd, %dx
1:      in %dx, %al
        test $0x20, %al
        jz 1b
        mov $0x3f8, %dx
        mov %ah, %al
        out %al, %dx
        jmp next
done:
        .if RESTART
        mov $0xcf9, %dx         # the reset control register
        mov $6, %al
        out %al, %dx
        .endif
1:      hlt
        jmp 1b
said:
        .if SAID == 0
        .asciz "Installing the base system ... 10%... 100%\r\nnagaya: the system is installed\r\n"
        .elseif SAID == 1
        .asciz "Download installer components\r\n-----------------------------\r\n\r\nThe mirror does not answer.\r\nTry again?\r\n  1: Yes [*]  2: No\r\nPrompt: '?' for help, default=1> \r\n"
        .else
        .asciz "Detecting network hardware ... 2%\r\n"
        .endif
        .org 0x600
