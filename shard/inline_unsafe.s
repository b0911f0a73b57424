// Empty: lets inline_unsafe.go declare functions without a body.
