"""A world in the browser: sessions run in turns by one thread, their frames as pictures over WebSockets.

`wire` is what goes over the socket, `pace` when a chunk is due, `worker` the thread with its sessions, `viewer` one
connection, `server` who may connect, `page.html` what they see.
"""
