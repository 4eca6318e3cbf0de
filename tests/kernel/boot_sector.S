# A system in 512 bytes, for the tests of whole machines. It greets on the serial line and on the screen, and then
# echoes what it reads from the line, and a K for each key of the keyboard; "w" writes a sector of 'W' behind itself on its disk, "r" says whether one is there.
# The power button (ACPI's, polled) and "q" switch it off. SeaBIOS puts the power management block at 0x600.
        .code16
        .globl _start
_start: cli
        xor %ax, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x7c00, %sp
        mov %dl, drive
        mov $0x602, %dx         # PM1 enable: or a press would not be seen
        mov $0x100, %ax
        out %ax, %dx
        mov $greeting, %si
        call print
poll:   mov $0x600, %dx         # PM1 status
        in %dx, %ax
        test $0x100, %ax
        jnz off
        in $0x64, %al           # the keyboard: a key that goes down is a K
        test $1, %al
        jz 3f
        in $0x60, %al
        test $0x80, %al
        jnz 3f
        mov $'K', %al
        call put
3:      mov $0x3fd, %dx
        in %dx, %al
        test $1, %al
        jz poll
        mov $0x3f8, %dx
        in %dx, %al
        cmp $'q', %al
        je off
        cmp $'w', %al
        je store
        cmp $'r', %al
        je load
        call put
        jmp poll
store:  mov $0x8000, %di
        mov $512, %cx
        mov $'W', %al
        cld
        rep stosb
        mov $0x0301, %ax
        call disk
        mov $stored, %si
        jc wrong
        call print
        jmp poll
load:   mov $0x0201, %ax
        call disk
        jc wrong
        mov 0x8000, %al
        cmp $'W', %al
        mov $found, %si
        je 1f
        mov $absent, %si
1:      call print
        jmp poll
wrong:  mov $error, %si
        call print
        jmp poll
disk:   mov $0x8000, %bx
        mov $0x0003, %cx        # cylinder 0, sector 3
        mov drive, %dl
        mov $0, %dh
        int $0x13
        ret
off:    mov $bye, %si
        call print
        mov $0x604, %dx         # PM1 control: sleep, type 5
        mov $0x2000, %ax
        out %ax, %dx
        hlt
print:  lodsb
        test %al, %al
        jz 2f
        call put
        jmp print
2:      ret
put:    push %ax
        mov $0x3f8, %dx
        out %al, %dx
        mov $0x0e, %ah
        mov $7, %bx
        int $0x10
        pop %ax
        ret
greeting: .asciz "READY\r\n"
stored: .asciz "stored\r\n"
found:  .asciz "found\r\n"
absent: .asciz "absent\r\n"
error:  .asciz "error\r\n"
bye:    .asciz "BYE\r\n"
drive:  .byte 0
        .org 510
        .word 0xaa55
